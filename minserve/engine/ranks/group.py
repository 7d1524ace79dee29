"""`RankGroup`: how a process reaches the other ranks of its group.

A group meets in a store that rank 0 hosts. Three things join its ranks:

- the store, for what is agreed on while all of them start;
- the line, by which rank 0 tells the others what to do next;
- the collectives of the passes: NCCL on GPUs; on CPUs shared memory, or gloo where there is none.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # TCPStore is not in its exports
    BroadcastOptions,
    PrefixStore,
    ProcessGroup,
    TCPStore,
)
from torch.distributed.distributed_c10d import ProcessGroupGloo

from minserve.engine.ranks.keeper import Keeper
from minserve.engine.ranks.shared_memory import PassRanks, SharedMemoryRanks
from minserve.errors import RankLostError
from minserve.models.ranks import GroupRanks

# For so long rank 0 waits for another rank within a pass. A server's watchdog is no more patient.
PATIENCE_S = 60.0
# The others wait for rank 0 as long as it lives, and end with it.
_NEVER = timedelta(days=30)
POLL_S = 0.005


class DeviceRanks(GroupRanks, PassRanks):
    """Ranks that are joined by a process group of their devices."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group)
        self._options = BroadcastOptions()
        self._options.rootRank = 0
        # On the stream of the layers, as the other collectives.
        self._options.asyncOp = False

    def broadcast(self, tensor: Tensor) -> Tensor:
        self._group.broadcast([tensor], self._options).wait()
        return tensor


def host_store(host: str) -> TCPStore:
    """Return a store that this process hosts, on a free port of that address alone."""
    family, kind, proto, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, proto)
    listening.bind(address)
    listening.listen(1024)
    port = listening.getsockname()[1]
    # Without a socket of ours, the store would listen on every interface.
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def reach_store(host: str, port: int) -> TCPStore:
    """Return the store of another process."""
    store = TCPStore(host, port, is_master=False, wait_for_workers=False)
    store.set_timeout(_NEVER)
    return store


class RankGroup:
    """A process's ends of all that joins its group. Making it waits for the other ranks.

    Args:
        memory: a descriptor of memory that all ranks share; ``None`` if they share none.
        keeper: on rank 0, who keeps the other ranks; ``None`` on these.

    Attributes:
        keeper: as above.
        ranks: the collectives of a pass.

    Raises:
        RankLostError: if a rank ends before it is there.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: TCPStore,
        address: str,
        device: torch.device,
        memory: int | None,
        keeper: Keeper | None,
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self.keeper = store, keeper
        self._num_agreed = 0
        patience = _NEVER if keeper is None else timedelta(seconds=PATIENCE_S)
        self.agree(0)
        self.ranks: PassRanks
        if device.type == "cuda":
            nccl = _nccl_group(store, rank, size)
            self.ranks = DeviceRanks(nccl)
            if keeper is not None:
                # Kernels that wait for a rank that has gone would occupy the device for ever.
                keeper.call_when_lost(lambda _: nccl.abort())
        elif memory is not None:
            self.ranks = SharedMemoryRanks(rank, size, memory, self._checker())
        else:
            self.ranks = DeviceRanks(_gloo_group(store, rank, size, address, patience))

    def agree(self, value: int) -> int:
        """Return the least of the values that all ranks call this with.

        For the time of starting: it takes milliseconds, and waits for as long as other ranks load.

        Raises:
            RankLostError: on rank 0, if another rank has ended; the others end with rank 0.
        """
        self._num_agreed += 1
        place = f"agree/{self._num_agreed}"
        keys = [f"{place}/{one}" for one in range(1, self.size)]
        if self.keeper is None:
            self._store.set(f"{place}/{self.rank}", str(value))
            return int(self._store.get(f"{place}/0"))
        while not self._store.check(keys):
            self.keeper.check()
            time.sleep(POLL_S)
        least = min(value, *(int(told) for told in self._store.multi_get(keys)))
        self._store.set(f"{place}/0", str(least))
        return least

    def _checker(self) -> Callable[[float], None]:
        keeper = self.keeper
        if keeper is None:
            return lambda _: None  # it ends with rank 0

        def check(waited_s: float) -> None:
            keeper.check()
            if waited_s > PATIENCE_S:
                raise RankLostError(f"a rank hangs: {waited_s:.0f} s in one sum", by_fault=True)

        return check


def report(store: TCPStore, rank: int, error: BaseException) -> None:
    """Leave word of why a rank ends, for rank 0."""
    with suppress(RuntimeError):
        store.set(f"failed/{rank}", f"{type(error).__name__}: {error}")


def told_by(store: TCPStore) -> Callable[[int], str]:
    """Return what tells why a rank ended, as far as it left word."""

    def told(rank: int) -> str:
        with suppress(RuntimeError):
            key = f"failed/{rank}"
            if store.check([key]):
                return store.get(key).decode()
        return ""

    return told


def _gloo_group(
    store: TCPStore, rank: int, size: int, address: str, patience: timedelta
) -> ProcessGroup:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
    # Without this, gloo would listen on whatever address the host's name resolves to.
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = patience
    options._threads = 1
    # torch's stubs know it, and NCCL's, as a backend alone.
    return cast(ProcessGroup, ProcessGroupGloo(PrefixStore("gloo", store), rank, size, options))


def _nccl_group(store: TCPStore, rank: int, size: int) -> ProcessGroup:
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

    group = ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, ProcessGroupNCCL.Options())
    return cast(ProcessGroup, group)
