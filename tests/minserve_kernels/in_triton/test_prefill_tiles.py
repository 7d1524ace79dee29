"""Tiles made on the device are those that the host would make, and none beyond them."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch

from minserve.kernels.triton.prefill_tiles import (
    NO_TILE,
    most_tiles,
    prefill_tiles,
    prefill_tiles_on_device,
)


def test_the_most_tiles_of_any_batch_are_counted() -> None:
    def tiles(counts: list[int]) -> int:
        return sum(-(-count // 4) for count in counts)

    for total in range(1, 14):
        for num in range(1, 4):
            splits = [
                [a, b, total - a - b][:num]
                for a in range(total + 1)
                for b in range(total + 1 - a)
                if num == 3 or (a + b == total and (num == 2 or b == 0))
            ]
            assert most_tiles(total, num, 4) == max(map(tiles, splits))


@pytest.mark.parametrize("seed", range(4))
def test_the_device_finds_the_tiles_of_the_host(seed: int, device: torch.device) -> None:
    rng = random.Random(seed)
    num_decodes, block_m = rng.randint(0, 5), rng.choice([16, 64])
    counts = [1] * num_decodes + [rng.choice([0, 1, 63, 64, 65, 300]) for _ in range(7)]
    starts = list(accumulate(counts, initial=0))
    padded = sum(counts[num_decodes:]) + rng.randint(0, 200)
    found = prefill_tiles_on_device(
        torch.tensor(starts, device=device), num_decodes, padded, block_m
    ).tolist()
    expected = prefill_tiles(starts, counts, num_decodes, block_m)
    assert len(found) == most_tiles(padded, 7, block_m)
    assert sorted(map(tuple, found[: len(expected)])) == sorted(expected)
    assert {seq for seq, _ in found[len(expected) :]} <= {NO_TILE}


def test_the_tiles_of_one_chunk_come_with_the_most_context_first(device: torch.device) -> None:
    starts = torch.tensor([0, 1, 131, 131, 131], device=device)
    found = prefill_tiles_on_device(starts, 1, 140, 64).tolist()
    assert found[:3] == [[1, 128], [1, 64], [1, 0]]
