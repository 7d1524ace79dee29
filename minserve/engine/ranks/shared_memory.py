"""Collectives of the ranks of one machine, through memory that they share.

Each rank puts its tensor into a slot of its own and raises its counter; once all counters are
there, each rank reads what it needs. That is two copies and a sum, where gloo sends every number
through the system's sockets. Sums are made in the order of the ranks by every rank, so that all
have the same bits, whatever the batch.

A rank may be one collective ahead of another, never two, because it needs the other's counter in
between. So two sets of slots, used in turns, are enough: what a rank overwrites was read.
Counters rely on stores being seen in the order in which they were made, as x86 promises.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import time
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from minserve.models.ranks import Ranks

# Bytes of a slot; larger tensors go through it in pieces. A counter has a cache line of its own.
SLOT, LINE = 2**22, 64
SETS = 2
# A wait begins with so many looks, then lets others run between looks for so many seconds, and
# then sleeps between them: most waits are short, but a core may be wanted by others meanwhile.
LOOKS, YIELD_S, NAP_S = 50, 0.002, 0.00005
# Naps between two questions whether all ranks are still there.
NAPS = 200
# Sizes of tensors for which views of the slots are kept.
MOST_KNOWN = 256


def is_supported() -> bool:
    """Return whether the ranks of this machine can meet in shared memory."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return sys.platform == "linux" and x86


def create(size: int) -> int:
    """Return a file descriptor of memory for so many ranks. It has no name, so that it ends with
    the last process that has it.
    """
    file = os.memfd_create("minserve-ranks", os.MFD_CLOEXEC)
    os.ftruncate(file, _slots_at(size) + SETS * size * SLOT)
    return file


def _slots_at(size: int) -> int:
    """Return where the slots begin, behind the counters, on a page of their own."""
    return -(-size * LINE // mmap.PAGESIZE) * mmap.PAGESIZE


class PassRanks(Ranks):
    """The collectives of a group's passes: those of a model, and one more."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by that of rank 0, and return it."""


class SharedMemoryRanks(PassRanks):
    """Ranks that share memory.

    Args:
        file: what `create` returned, in any of the processes.
        check: called now and then while a rank waits, with the seconds so far; it raises an error
            where waiting is in vain.
    """

    def __init__(self, rank: int, size: int, file: int, check: Callable[[float], None]) -> None:
        super().__init__(rank, size)
        self._memory = mmap.mmap(file, 0)
        self._counters = (ctypes.c_int64 * (size * LINE // 8)).from_buffer(self._memory)
        self._slots = [
            [
                torch.frombuffer(
                    self._memory,
                    dtype=torch.uint8,
                    count=SLOT,
                    offset=_slots_at(size) + (turn * size + one) * SLOT,
                )
                for one in range(size)
            ]
            for turn in range(SETS)
        ]
        self._others = [one * LINE // 8 for one in range(size) if one != rank]
        self._own = rank * LINE // 8
        self._check = check
        self._known: dict[tuple[int, torch.dtype], list[list[Tensor]]] = {}
        self._count = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        for piece in tensor.view(-1).split(SLOT // tensor.itemsize):
            slots = self._exchange(piece)
            if self.size == 2:  # the same sum in either order
                piece.add_(slots[1 - self.rank])
                continue
            total = slots[0].to(torch.float32, copy=True)
            for slot in slots[1:]:
                total += slot
            piece.copy_(total)
        return tensor

    def gather(self, columns: Tensor) -> Tensor:
        num_rows, width = columns.shape
        whole = columns
        if self.rank == 0:
            whole = columns.new_empty(num_rows, self.size * width)
        rows_at_once = max(1, SLOT // (max(1, width) * columns.itemsize))
        for first in range(0, num_rows, rows_at_once):
            rows = columns[first : first + rows_at_once]
            slots = self._exchange(rows.reshape(-1), puts=self.rank != 0)
            if self.rank == 0:
                parts = [rows, *(slot.view(rows.shape) for slot in slots[1:])]
                torch.cat(parts, -1, out=whole[first : first + len(rows)])
        return whole

    def broadcast(self, tensor: Tensor) -> Tensor:
        for piece in tensor.view(-1).split(SLOT // tensor.itemsize):
            slots = self._exchange(piece, puts=self.rank == 0)
            if self.rank != 0:
                piece.copy_(slots[0])
        return tensor

    def _exchange(self, piece: Tensor, *, puts: bool = True) -> list[Tensor]:
        """Put a flat tensor into this rank's slot, unless nobody wants it; return those of all."""
        count = self._count = self._count + 1
        slots = self._views(piece.numel(), piece.dtype)[count % SETS]
        if puts:
            slots[self.rank].copy_(piece)
        self._counters[self._own] = count
        for other in self._others:
            if self._counters[other] < count:
                self._wait(other, count)
        return slots

    def _views(self, numel: int, dtype: torch.dtype) -> list[list[Tensor]]:
        """Return the beginnings of all slots as flat tensors; made once for each size."""
        views = self._known.get((numel, dtype))
        if views is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            end = numel * dtype.itemsize
            views = [[slot[:end].view(dtype) for slot in slots] for slots in self._slots]
            self._known[numel, dtype] = views
        return views

    def _wait(self, other: int, count: int) -> None:
        """Wait until another rank's counter is there."""
        counters = self._counters
        for _ in range(LOOKS):
            if counters[other] >= count:
                return
        began = time.perf_counter()
        while time.perf_counter() < began + YIELD_S:
            os.sched_yield()
            if counters[other] >= count:
                return
        while True:
            for _ in range(NAPS):
                if counters[other] >= count:
                    return
                time.sleep(NAP_S)
            self._check(time.perf_counter() - began)
