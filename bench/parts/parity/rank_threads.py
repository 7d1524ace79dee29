"""A model divided among ranks that are threads of one process, to compare it with the whole model.

Threads start in no time, and what the ranks compute and send each other is the same as in processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # HashStore is not in its exports
    HashStore,
    ProcessGroupGloo,
)

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.base import CausalLM
from minserve.models.ranks import GroupRanks, Ranks

T = TypeVar("T")
TIMEOUT = timedelta(seconds=60)


class RankThreads:
    """A thread for each rank of a group. It is a context manager, which ends them."""

    def __init__(self, size: int) -> None:
        self._pools = [ThreadPoolExecutor(1) for _ in range(size)]
        store = HashStore()
        self._ranks = self._wait(
            [
                pool.submit(
                    lambda rank: GroupRanks(ProcessGroupGloo(store, rank, size, TIMEOUT)), i
                )
                for i, pool in enumerate(self._pools)
            ]
        )

    def on_each(self, work: Callable[[Ranks], T]) -> list[T]:
        """Return what ``work`` returns on each rank; all ranks work at once."""
        tasks = zip(self._pools, self._ranks, strict=True)
        return self._wait([pool.submit(self._run, work, ranks) for pool, ranks in tasks])

    @staticmethod
    @torch.inference_mode()
    def _run(work: Callable[[Ranks], T], ranks: Ranks) -> T:
        return work(ranks)

    @staticmethod
    def _wait(futures: Sequence[Future[T]]) -> list[T]:
        return [future.result() for future in futures]

    def __enter__(self) -> RankThreads:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()


class DividedModel(CausalLM):
    """A model whose parts run in `RankThreads`, as one model to the engine.

    Args:
        parts: the model of each rank.
        others: backend and cache of each rank but the first, which gets them from the engine.
    """

    def __init__(
        self,
        threads: RankThreads,
        parts: Sequence[CausalLM],
        others: Sequence[tuple[AttentionBackend, list[LayerKV]]],
    ) -> None:
        self._threads = threads
        self._parts = parts
        self._others = others
        first = parts[0]
        self.shape, self.embed, self.placement = first.shape, first.embed, first.placement
        self.linear_dtype = first.linear_dtype

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKV],
        backend: AttentionBackend,
        metadata: AttentionMetadata,
    ) -> Tensor:
        def run(ranks: Ranks) -> Tensor:
            own_backend, own_kv, own = backend, kv, metadata
            if ranks.rank:
                own_backend, own_kv = self._others[ranks.rank - 1]
                own = replace(metadata, state=None)
                own_backend.prepare(own)
            model = self._parts[ranks.rank]
            return model.forward(token_ids, positions, own_kv, own_backend, own)

        return self._threads.on_each(run)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._threads.on_each(lambda ranks: self._parts[ranks.rank].logits(hidden))[0]
