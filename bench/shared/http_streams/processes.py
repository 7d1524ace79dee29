"""The processor time of a server by what it is for: HTTP, the engine, and the reading of bodies."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import psutil

from minserve.workload.server_process import family

HTTP, ENGINE, READERS = "http", "engine", "readers"
# The module that is an engine's process.
_ENGINE_MODULE = "minserve.controller.replica_process"


def cpu_by_part(pid: int) -> Counter[str]:
    """Return the processor seconds that a server has used so far.

    Args:
        pid: of the process that has the HTTP port.

    Returns:
        seconds by part. In a server of one process the main thread is HTTP's, and the others are the
        engine's.
    """
    found: Counter[str] = Counter()
    processes = family(pid)
    kinds = {process: _part_of(process, pid) for process in processes}
    is_apart = ENGINE in kinds.values()
    for process, kind in kinds.items():
        with suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                own = process.pid == pid and not is_apart and thread.id != pid
                found[ENGINE if own else kind] += thread.user_time + thread.system_time
    return found


def _part_of(process: psutil.Process, pid: int) -> str:
    if process.pid == pid:
        return HTTP
    with suppress(psutil.NoSuchProcess):
        words = " ".join(process.cmdline())
        if _ENGINE_MODULE in words:
            return ENGINE
    return READERS
