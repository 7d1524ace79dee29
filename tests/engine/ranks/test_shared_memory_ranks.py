"""Sums, gathering and broadcasts in shared memory, against plain tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from minserve.engine.ranks import shared_memory
from minserve.engine.ranks.shared_memory import SharedMemoryRanks
from minserve.errors import RankLostError

pytestmark = pytest.mark.skipif(not shared_memory.is_supported(), reason="needs Linux on x86")


def run(size: int, work: Callable[[SharedMemoryRanks], Tensor]) -> list[Tensor]:
    """What each rank gets, with a thread for each."""
    file = shared_memory.create(size)
    try:
        ranks = [SharedMemoryRanks(rank, size, file, lambda _: None) for rank in range(size)]
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(work, ranks))
    finally:
        os.close(file)


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger tensors go in pieces; threads that wait let each other run at once."""
    monkeypatch.setattr(shared_memory, "SLOT", 2**12)
    monkeypatch.setattr(shared_memory, "YIELD_S", 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_same_sum(size: int, dtype: torch.dtype) -> None:
    parts = [torch.randn(7, 999, generator=torch.Generator().manual_seed(i)) for i in range(size)]
    parts = [part.to(dtype) for part in parts]
    wanted = sum(part.double() for part in parts)

    def work(ranks: SharedMemoryRanks) -> Tensor:
        for _ in range(3):  # each sum takes several turns of the slots
            found = ranks.all_reduce(parts[ranks.rank].clone())
        return found

    found = run(size, work)
    assert all(torch.equal(one, found[0]) for one in found)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found[0].double(), wanted, rtol=tolerance, atol=tolerance)


def test_columns_are_gathered_in_the_order_of_the_ranks() -> None:
    parts = [torch.arange(50 * 300.0).view(50, 300) + 1e6 * rank for rank in range(3)]
    found = run(3, lambda ranks: ranks.gather(parts[ranks.rank]))
    assert torch.equal(found[0], torch.cat(parts, -1))
    assert torch.equal(found[2], parts[2])


def test_a_broadcast_gives_all_what_rank_0_has() -> None:
    def work(ranks: SharedMemoryRanks) -> Tensor:
        own = torch.full((3, 2000), ranks.rank, dtype=torch.int64)
        return ranks.broadcast(own)

    assert all(not one.any() for one in run(2, work))


def test_who_waits_in_vain_asks_and_gets_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "NAPS", 1)

    def check(waited_s: float) -> None:
        raise RankLostError(f"gone for {waited_s:.0f} s", by_fault=False)

    file = shared_memory.create(2)
    ranks = SharedMemoryRanks(0, 2, file, check)
    os.close(file)
    with pytest.raises(RankLostError, match="gone"):
        ranks.all_reduce(torch.ones(4))
