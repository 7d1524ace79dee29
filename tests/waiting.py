"""Waiting for what another thread or process does: only a test that hangs ends by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

# Far more than anything takes, also on a busy machine.
PATIENCE_S = 120.0


def wait_until(found: Callable[[], Any], says: str = "it does not come about") -> Any:
    """What a function returns once that is true.

    Raises:
        AssertionError: with these words, where it never is.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < deadline, says
        time.sleep(0.01)
    return value


def is_alive(pid: int) -> bool:
    """Whether a process runs or is stopped; nobody may be there to collect one that has ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
