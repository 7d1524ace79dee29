"""The search of `kernel_bench.py --tune --quick`: one value at a time, on from the best."""

from __future__ import annotations

from parts.kernel_bench.tune import TRIED, Change, climb


def test_the_search_finds_values_that_are_best_one_by_one():
    best = {"num_stages": 4, "block_n": 128, "num_warps": 8, "least_split": 512, "block_size": 64}
    tried: list[Change] = []

    def time_of(change: Change) -> float | None:
        tried.append(change)
        if change.get("block_n") == 128 and change.get("num_stages") == 5:
            return None  # too large for the device
        return 10.0 - sum(change.get(name) == value for name, value in best.items())

    found = climb(time_of, "decode")
    assert found[0] == (5.0, best)
    assert ({}, 10.0) in [(change, ms) for ms, change in found], "the tile as chosen is among them"
    assert len(tried) == len({tuple(sorted(change.items())) for change in tried})
    assert len(tried) < 50, "far fewer than all combinations"


def test_blocks_stages_and_warps_are_tried_in_their_ranges():
    for tried in TRIED.values():
        assert tried["block_size"] == (16, 32, 64, 128)
        assert tried["num_stages"] == (2, 3, 4, 5)
        assert tried["block_n"] == (32, 64, 128)
        assert tried["num_warps"] == (4, 8)
