"""What a process may use of a machine whose limits are made up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest

from minserve import machine
from minserve.cgroups import CgroupLimits, MemoryLimit
from minserve.machine import GIB, Machine

LookAt = Callable[..., Machine]
NO_LIMITS = CgroupLimits()


@pytest.fixture
def look_at(monkeypatch: pytest.MonkeyPatch) -> LookAt:
    """A look at 8 processors of 4 cores with 16 GiB, 10 of them free."""

    def look(limits: CgroupLimits = NO_LIMITS, allowed: int = 8) -> Machine:
        memory = SimpleNamespace(total=16 * GIB, available=10 * GIB)
        monkeypatch.setattr(machine, "read_limits", lambda: limits)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)), raising=False)
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        return Machine.look()

    return look


@pytest.mark.parametrize(
    ("quota", "num_threads", "num_processes"),
    [
        (None, 4, 8),
        (0.1, 1, 1),
        (1.0, 1, 1),
        (1.5, 1, 1),
        (2.0, 2, 2),
        (3.99, 3, 3),
        (6.0, 4, 6),
        (32.0, 4, 8),
    ],
)
def test_threads_fit_cores_and_quota(
    look_at: LookAt, quota: float | None, num_threads: int, num_processes: int
) -> None:
    found = look_at(CgroupLimits(cpus=quota))
    assert (found.num_threads, found.num_processes) == (num_threads, num_processes)


def test_the_affinity_counts_too(look_at: LookAt) -> None:
    assert look_at(allowed=3).num_threads == 3
    assert look_at(CgroupLimits(cpus=5.0), allowed=3).cpu_quota is None
    assert look_at(CgroupLimits(cpus=2.0), allowed=3).num_threads == 2


def test_free_is_what_both_machine_and_group_have(look_at: LookAt) -> None:
    assert look_at().free_memory == 10 * GIB
    for limit, free, expected in ((12, 11, 10), (12, 3, 3), (2, 0, 0)):
        found = look_at(CgroupLimits(memory=MemoryLimit(limit * GIB, free * GIB)))
        assert found.free_memory == expected * GIB


def test_limits_are_told_in_a_line_and_only_where_there_are_some(look_at: LookAt) -> None:
    assert look_at().limit_words(4, GIB) == ""
    # No limit for this machine.
    wide = CgroupLimits(cpus=8.0, memory=MemoryLimit(16 * GIB, 12 * GIB))
    assert look_at(wide).limit_words(4, GIB) == ""
    both = look_at(CgroupLimits(1.5, MemoryLimit(2 * GIB, GIB)))
    assert both.limit_words(1, GIB // 4) == (
        "8 CPUs, limited to 1.5 by a cgroup: 1 thread; "
        "memory limited to 2.00 GiB by a cgroup, 1.00 GiB free: KV cache of 0.25 GiB"
    )
    # On a GPU the cache is elsewhere.
    assert both.limit_words(2, None) == "8 CPUs, limited to 1.5 by a cgroup: 2 threads"


def test_threads_beyond_the_quota_are_warned_of(
    look_at: LookAt, caplog: pytest.LogCaptureFixture
) -> None:
    for quota, threads in ((None, 8), (0.5, 1), (1.0, 1), (3.0, 3), (2.5, 2)):
        look_at(CgroupLimits(cpus=quota)).warn_of(threads, "--threads")
    assert not caplog.records
    look_at(CgroupLimits(cpus=1.5)).warn_of(2, "--threads 2")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "--threads 2: 2 threads, but a cgroup limits this process to 1.5 CPUs" in record.message
    assert record.message.endswith("or use 1")


def test_threads_beyond_the_processors_are_warned_of(
    look_at: LookAt, caplog: pytest.LogCaptureFixture
) -> None:
    look_at(CgroupLimits()).warn_of(64, "--threads 64")
    (record,) = caplog.records
    assert "--threads 64: 64 threads, but this process may run on 8 processors" in record.message
