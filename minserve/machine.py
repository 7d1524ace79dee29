"""What of the machine this process may use: cores and memory, as a container's limits leave them."""

from __future__ import annotations

import logging
import math
import os
import platform
from dataclasses import dataclass, replace

import psutil

from minserve.cgroups import read_limits
from minserve.cpu_name import cpu_name

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A look at the machine at one moment.

    Attributes:
        processors: logical ones that the process may run on.
        cores: physical ones, at most `processors`.
        cpu_quota: processor time that cgroups allow, in processors; ``None`` where it
            does not limit `processors`.
        memory_limit: bytes that cgroups allow, ``None`` where that is no less than the machine has.
        free_memory: bytes that can still be used before the machine or a cgroup is full.
    """

    processors: int
    cores: int
    cpu_quota: float | None
    memory_limit: int | None
    free_memory: int

    @classmethod
    def look(cls) -> Machine:
        """The machine as it is now."""
        processors = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            processors = len(os.sched_getaffinity(0))
        memory, limits = psutil.virtual_memory(), read_limits()
        quota, free, limit = limits.cpus, memory.available, None
        if limits.memory is not None:
            free = min(free, limits.memory.free)
            limit = limits.memory.limit
        return cls(
            processors=processors,
            cores=min(psutil.cpu_count(logical=False) or processors, processors),
            cpu_quota=quota if quota is not None and quota < processors else None,
            memory_limit=limit if limit is not None and limit < memory.total else None,
            free_memory=free,
        )

    def shared_by(self, num_processes: int) -> Machine:
        """The machine with the memory that one of so many equal processes may take."""
        return replace(self, free_memory=self.free_memory // num_processes)

    @property
    def num_threads(self) -> int:
        """Threads that compute without getting in each other's way: one for each core.

        Threads beyond a CPU quota use it up together early in each period and then all stand
        still, each holding up the others where they meet. So 1.5 processors run 1 thread; the
        half is the server's own work's.
        """
        return self._within_quota(self.cores)

    @property
    def num_processes(self) -> int:
        """Single-threaded processes that can be busy at once."""
        return self._within_quota(self.processors)

    def _within_quota(self, number: int) -> int:
        return number if self.cpu_quota is None else max(1, min(number, math.floor(self.cpu_quota)))

    def warn_of(self, threads: int, setting: str) -> None:
        """Log that threads, as a setting asks for them, are more than run at once."""
        if self.cpu_quota is not None and threads > max(1, self.cpu_quota):
            log.warning(
                "%s: %d threads, but a cgroup limits this process to %g CPUs; they will be stopped "
                "together in every period and may run many times slower: raise the limit or use %d",
                setting,
                threads,
                self.cpu_quota,
                self.num_threads,
            )
        elif threads > self.processors:
            log.warning(
                "%s: %d threads, but this process may run on %d processors; threads that wait for "
                "one hold up all others: use %d",
                setting,
                threads,
                self.processors,
                self.num_threads,
            )

    @property
    def memory_words(self) -> str:
        """How much memory is free, for people, and what limits it."""
        free = f"{self.free_memory / GIB:.2f} GiB free"
        if self.memory_limit is None:
            return free
        return f"memory limited to {self.memory_limit / GIB:.2f} GiB by a cgroup, {free}"

    def limit_words(self, threads: int, kv_bytes: int | None) -> str:
        """The limits that cgroups set and what was made of them, for people; empty where there
        are none.

        Args:
            threads: that compute.
            kv_bytes: of the KV cache, ``None`` where it lies elsewhere.
        """
        words = []
        if self.cpu_quota is not None:
            words.append(
                f"{self.processors} CPUs, limited to {self.cpu_quota:g} by a cgroup: "
                f"{threads} thread{'s' if threads > 1 else ''}"
            )
        if self.memory_limit is not None and kv_bytes is not None:
            words.append(f"{self.memory_words}: KV cache of {kv_bytes / GIB:.2f} GiB")
        return "; ".join(words)


def machine_words() -> str:
    """Describe this machine in a few words, for people and to be compared."""
    quota = Machine.look().cpu_quota
    limited = "" if quota is None else f" limited to {quota:g}"
    return f"{cpu_name()}, {os.cpu_count()} cores{limited}, {platform.system()}"
