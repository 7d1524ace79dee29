"""What min_p, top_k and top_p keep: plain torch against a sort, to the last token."""

from __future__ import annotations

import pytest
import torch
from truncations import KINDS, VOCABS, by_sort, every_limit, limits_of, weights_of

from minserve.kernels.truncation import UNITS, TruncationLimits, truncate


@pytest.fixture(params=[True, False], ids=["may look", "may not look"])
def may_look(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [7, 300])
def test_every_combination_keeps_what_a_sort_keeps(
    kind: str, size: int, may_look: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    limits = limits_of(every_limit(size))
    weights = weights_of([kind] * len(limits.top_k), size).to(device)
    expected = by_sort(weights, limits)
    assert torch.equal(truncate(weights, limits, may_look=may_look), expected)


@pytest.mark.parametrize("size", VOCABS)
def test_vocabularies_of_real_models_keep_what_a_sort_keeps(
    size: int, may_look: bool, device: torch.device
) -> None:
    torch.manual_seed(1)
    weights = weights_of([*KINDS], size).to(device)
    limits = limits_of(every_limit(size)[: len(KINDS)])
    expected = by_sort(weights, limits)
    assert torch.equal(truncate(weights, limits, may_look=may_look), expected)


def test_the_sum_that_top_p_wants_may_be_met_exactly(may_look: bool, device: torch.device) -> None:
    weights = torch.tensor([[0.5, 1.0, 0.25, 0.25]], device=device)
    for top_p, kept in ((0.5, [1]), (0.5 + 2**-40, [0, 1]), (0.75, [0, 1]), (0.875, [0, 1, 2])):
        left = truncate(weights.clone(), TruncationLimits([0.0], [0], [top_p]), may_look=may_look)
        assert left[0].nonzero().flatten().tolist() == kept


def test_the_order_of_the_tokens_changes_nothing(may_look: bool, device: torch.device) -> None:
    torch.manual_seed(2)
    # Float sums of these depend on their order, and the border lies where it shows.
    weights = weights_of(["normal"], 5000).to(device)
    masses = (weights.double() * UNITS).long()
    ranked = masses.sort(descending=True).values[0]
    for last in (10, 100, 1000):
        # As near below the sum of the first ones as float64 says.
        top_p = (int(ranked[:last].sum()) - 0.5) / int(ranked.sum())
        limits = TruncationLimits([0.0], [0], [top_p])
        kept = truncate(weights.clone(), limits, may_look=may_look) > 0
        assert kept.sum() == last
        order = torch.randperm(5000, device=device)
        other = truncate(weights[:, order], limits, may_look=may_look) > 0
        assert torch.equal(kept[:, order], other)


def test_a_row_of_nan_stays_and_harms_no_other(may_look: bool, device: torch.device) -> None:
    torch.manual_seed(3)
    weights = weights_of(["normal"] * 4, 512).to(device)
    weights[1], weights[2] = torch.nan, -torch.nan
    limits = TruncationLimits([0.1, 0.1, 0.0, 0.0], [5, 5, 0, 5], [0.9, 0.9, 0.5, 0.9])
    expected = by_sort(weights[::3], TruncationLimits(*(values[::3] for values in limits)))
    left = truncate(weights, limits, may_look=may_look)
    assert left[1:3].isnan().all()
    assert torch.equal(left[::3], expected)


def test_no_rows_are_none_afterwards(may_look: bool, device: torch.device) -> None:
    none = torch.ones(0, 7, device=device)
    assert truncate(none, TruncationLimits([], [], []), may_look=may_look).shape == (0, 7)


def test_limits_that_keep_all_are_told() -> None:
    assert TruncationLimits([], [], []).keep_all
    assert TruncationLimits([0.0, -0.0], [0, 0], [1.0, 1.0]).keep_all
    for one in (
        TruncationLimits([0.1], [0], [1.0]),
        TruncationLimits([0.0], [3], [1.0]),
        TruncationLimits([0.0], [0], [0.9]),
    ):
        assert not one.keep_all
