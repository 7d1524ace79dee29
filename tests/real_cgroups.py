"""Cgroups of a test's own, with limits that the kernel enforces."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PERIOD_US = 100_000
# A killed process can be counted for a moment after it was waited for.
EMPTY_S = 10.0


@contextmanager
def real_cgroup(cpus: float, memory_bytes: int) -> Iterator[Callable[[], None]]:
    """A group with these limits below this process's own, whose limits hold there too. Gone
    when the context ends, by when its processes must have ended.

    Yields:
        what a child calls to enter it (``preexec_fn``).
    """
    folders: list[Path] = []
    try:
        try:
            for controller, files in (
                ("cpu", {"cpu.cfs_period_us": PERIOD_US,
                         "cpu.cfs_quota_us": int(cpus * PERIOD_US)}),
                ("memory", {"memory.limit_in_bytes": memory_bytes}),
            ):  # fmt: skip
                folder = _own_group(controller) / f"minserve-test-{os.getpid()}"
                folder.mkdir()
                folders.append(folder)
                for name, value in files.items():
                    (folder / name).write_text(str(value))
        except OSError as error:
            pytest.skip(f"no permission to create cgroups of version 1: {error}")

        def enter() -> None:
            for folder in folders:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        yield enter
    finally:
        for folder in folders:
            _remove(folder)


def _own_group(controller: str) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
    raise OSError(f"no {controller} controller of version 1")


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + EMPTY_S
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
