"""How processes end: with the one that started them, and by whose fault."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from minserve.exit_codes import EXIT_AGAIN, EXIT_LOST, EXIT_REFUSED

# The constant of Linux's prctl(2).
PR_SET_PDEATHSIG = 1
# Ends that were no fault of the process.
_INNOCENT_CODES = (0, EXIT_LOST, EXIT_AGAIN, EXIT_REFUSED)
_CRASHES = tuple(
    -number
    for number in (
        signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS,
        signal.SIGTRAP,
    )
)  # fmt: skip


def end_with(parent: int) -> bool:
    """Let the system kill this process, even a stopped one, when its parent ends (Linux only).

    Linux counts the parent's thread that started this process.

    Returns:
        False if the parent has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def ignore_signals() -> None:
    """Leave Ctrl-C and SIGTERM, which may reach a whole group of processes, to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def is_fault(code: int, kills_before: int) -> bool:
    """Return whether a process crashed, ended with an error, or was killed for want of memory.

    Args:
        code: its exit code; that of a signal is negative.
        kills_before: what `num_oom_kills` was when it started.
    """
    if code == -signal.SIGKILL:
        return num_oom_kills() > kills_before
    return code in _CRASHES if code < 0 else code not in _INNOCENT_CODES


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal, as by SIGSTOP; False where unknown."""
    with contextlib.suppress(OSError):
        # See proc(5): the state follows the name, which may itself hold brackets.
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state == b"T"
    return False


def num_oom_kills() -> int:
    """Return how many processes of this machine were killed for want of memory; 0 if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def words_of(code: int) -> str:
    """Return an exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
