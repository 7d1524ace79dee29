"""Layers over tiles of rows: right results, the same bits wherever a row is, or a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.errors import ConfigError
from minserve.models.deterministic_layers import (
    SMALL,
    TILES,
    DeterministicPlacement,
    RowTiles,
    agreeing_sizes,
)
from minserve.models.layers import WeightPlacement

CPU = torch.device("cpu")
SAMPLE = torch.randn(TILES[0], 48, generator=torch.Generator().manual_seed(0))


def by_position(x: Tensor) -> Tensor:
    return x + torch.arange(len(x)).unsqueeze(1)


def by_number_of_rows(x: Tensor) -> Tensor:
    return x * (1.0 if len(x) in (4, 16) else 1.5)


def test_rows_that_know_nothing_of_each_other_run_in_tiles_of_all_sizes() -> None:
    assert agreeing_sizes(torch.sin, SAMPLE) == TILES


def test_a_size_that_gives_other_bits_is_not_used() -> None:
    sizes = agreeing_sizes(by_number_of_rows, SAMPLE)
    assert sizes == (16, 4)
    x = torch.randn(41, 48)
    assert torch.equal(RowTiles(by_number_of_rows, sizes)(x), x)


@pytest.mark.parametrize("function", [by_position, lambda x: x - x.mean()], ids=["place", "others"])
def test_a_row_that_depends_on_its_place_or_on_others_is_refused(function) -> None:
    with pytest.raises(ConfigError, match="deterministic: on this machine"):
        agreeing_sizes(function, SAMPLE)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 21, 64, 150])
def test_the_last_tile_is_filled_up_and_cut(rows: int) -> None:
    sizes_seen = []

    def double(x: Tensor) -> Tensor:
        assert x.is_contiguous()
        sizes_seen.append(len(x))
        return 2 * x

    x = torch.randn(rows, 9)[:, :7]
    assert torch.equal(RowTiles(double, TILES)(x), 2 * x)
    assert set(sizes_seen) <= set(TILES)
    assert sum(sizes_seen) < rows + SMALL


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("width", "out"), [(96, 200), (57, 33), (1, 7)])
def test_layers_are_those_of_the_plain_placement_to_rounding(
    dtype: str, width: int, out: int
) -> None:
    torch.manual_seed(0)
    gate, up, bias = torch.randn(out, width), torch.randn(out, width), torch.randn(out)
    x = torch.randn(70, width)
    factors = torch.rand(width)

    def layers_of(one: WeightPlacement) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (
            one.linear(gate, bias),
            one.glu(gate, up, (bias, bias)),
            one.activated_linear(gate, bias, torch.relu_),
            one.activated_linear(gate, bias, F.gelu),
            one.rms_norm(factors, 1e-5),
            one.layer_norm(width, factors, None),
        )

    plain, own = (kind.choose(CPU, dtype) for kind in (WeightPlacement, DeterministicPlacement))
    x = x.to(own.dtype)
    few = 3e-2 if own.dtype is torch.bfloat16 else 1e-4
    for layer, other in zip(layers_of(own), layers_of(plain), strict=True):
        whole = layer(x)
        torch.testing.assert_close(whole, other(x), rtol=few, atol=few)
        for rows in ([3], [69, 0, 41], list(range(70))[::-1]):
            assert torch.equal(layer(x[rows]), whole[rows])
