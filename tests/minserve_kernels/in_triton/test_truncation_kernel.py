"""The truncation kernel against a sort, to the last token."""

from __future__ import annotations

import pytest
import torch
from truncations import KINDS, VOCABS, by_sort, every_limit, limits_of, weights_of

from minserve.kernels.triton import truncation
from minserve.kernels.triton.truncation import truncate
from minserve.kernels.truncation import TruncationLimits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [7, 300])
def test_every_combination_keeps_what_a_sort_keeps(
    kind: str, size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(truncation, "BLOCK", 128)  # several, the last not full
    # The interpreter is slow: each kind meets every seventh combination, another one in turn.
    limits = limits_of(every_limit(size)[KINDS.index(kind) % 7 :: 7])
    weights = weights_of([kind] * len(limits.top_k), size).to(device)
    expected = by_sort(weights, limits)
    assert torch.equal(truncate(weights, limits), expected)


@pytest.mark.parametrize("size", VOCABS)
def test_vocabularies_of_real_models_keep_what_a_sort_keeps(
    size: int, device: torch.device
) -> None:
    torch.manual_seed(1)
    weights = weights_of([*KINDS], size).to(device)
    limits = limits_of(every_limit(size)[: len(KINDS)])
    expected = by_sort(weights, limits)
    assert torch.equal(truncate(weights, limits), expected)


def test_rows_that_restrict_nothing_stay_beside_others(device: torch.device) -> None:
    torch.manual_seed(2)
    weights = weights_of(["ties"] * 3, 1000).to(device)
    before = weights.clone()
    truncate(weights, TruncationLimits([0.0] * 3, [0] * 3, [1.0, 0.3, 1.0]))
    assert torch.equal(weights[::2], before[::2])
    assert (weights[1] > 0).sum() < (before[1] > 0).sum()


def test_a_row_of_nan_stays_and_harms_no_other(device: torch.device) -> None:
    torch.manual_seed(3)
    weights = weights_of(["normal"] * 4, 512).to(device)
    weights[1], weights[2] = torch.nan, -torch.nan
    limits = TruncationLimits([0.1, 0.1, 0.0, 0.0], [5, 5, 0, 5], [0.9, 0.9, 0.5, 0.9])
    expected = by_sort(weights[::3], TruncationLimits(*(values[::3] for values in limits)))
    truncate(weights, limits)
    assert weights[1:3].isnan().all()
    assert torch.equal(weights[::3], expected)


def test_no_rows_launch_nothing(device: torch.device) -> None:
    assert truncate(torch.ones(0, 7, device=device), TruncationLimits([], [], [])).shape == (0, 7)
