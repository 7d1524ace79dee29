"""Processes that are started again, killed where they hang, and never outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from waiting import PATIENCE_S, is_alive, wait_until

from minserve import process_ends
from minserve.controller import processes
from minserve.controller.processes import Watcher
from minserve.controller.replica_process import ReplicaSpec
from minserve.errors import ReplicaLostError
from minserve.exit_codes import EXIT_AGAIN, EXIT_ERROR, EXIT_FAULT, EXIT_LOST
from minserve.process_ends import is_stopped

SPEC = ReplicaSpec(index=0, store_host="", store_port=0, settings={}, profile_s=1.0, watchdog_s=1.0)
# Takes the place of a replica's process, without an engine.
STAND_IN = """
import os, signal, sys, time
from minserve.process_ends import end_with
if os.environ.get("STOPS_FIRST"):
    os.kill(os.getpid(), signal.SIGSTOP)
assert end_with(int(sys.argv[2]))
open(os.environ["HERE"], "w").write(str(os.getpid()))
time.sleep(1000)
"""
# A parent of it: a watcher on a loop.
PARENT = """
import asyncio, os
from minserve.controller import processes
from test_processes import SPEC
processes.MODULE = "stand_in"
async def main():
    watcher = processes.Watcher(SPEC, {}, 1000.0)
    asyncio.create_task(watcher.run(lambda: True))
    while watcher.pid is None:
        await asyncio.sleep(0.01)
    print(watcher.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the process that stands in for a replica writes its id once it is bound to its parent."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    path = [str(tmp_path), str(Path(__file__).parent), str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("HERE", str(tmp_path / "here"))
    monkeypatch.setattr(processes, "MODULE", "stand_in")
    monkeypatch.setattr(processes, "FIRST_PAUSE_S", 0.01)
    return tmp_path / "here"


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.01)


def watched(test: Callable[[Watcher], Coroutine], patience_s: float = 1000.0) -> None:
    """Run a test with a watcher whose process is there."""

    async def main() -> None:
        watcher = Watcher(SPEC, {}, patience_s)
        running = asyncio.create_task(watcher.run(lambda: True))
        try:
            await until(lambda: watcher.pid is not None)
            await test(watcher)
        finally:
            await watcher.stop(0.0)
            await running

    asyncio.run(main())


ENDS = {
    "abort": (f"os.kill(os.getpid(), {signal.SIGABRT})", True),
    "segfault": (f"os.kill(os.getpid(), {signal.SIGSEGV})", True),
    "exception": ("raise RuntimeError", True),
    "engine broken": (f"os._exit({EXIT_FAULT})", True),
    "error": (f"os._exit({EXIT_ERROR})", True),
    "killed": (f"os.kill(os.getpid(), {signal.SIGKILL})", False),
    "terminated": (f"os.kill(os.getpid(), {signal.SIGTERM})", False),
    "connection lost": (f"os._exit({EXIT_LOST})", False),
    "told to": (f"os._exit({EXIT_AGAIN})", False),
    "stopped": (f"os.kill(os.getpid(), {signal.SIGSTOP})", False),
    "goes on": ("time.sleep(1000)", False),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_fault_is_told_from_what_comes_from_outside(
    stand_in: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    does, fault = ENDS[how]
    (stand_in.parent / "stand_in.py").write_text(f"import os, time\n{does}\n")
    monkeypatch.setattr(processes, "END_S", PATIENCE_S if fault else 0.5)

    async def test(watcher: Watcher) -> None:
        pid = watcher.pid
        assert await watcher.ended_by_fault(pid) is fault
        await until(lambda: watcher.pid != pid)

    watched(test)


@pytest.mark.usefixtures("stand_in")
def test_a_kill_for_want_of_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(watcher: Watcher) -> None:
        monkeypatch.setattr(process_ends, "num_oom_kills", lambda: 10**9)
        os.kill(watcher.pid, signal.SIGKILL)
        assert await watcher.ended_by_fault(watcher.pid)

    watched(test)


def test_a_process_that_is_stopped_before_it_has_joined_is_replaced(stand_in: Path) -> None:
    async def test(watcher: Watcher) -> None:
        await until(stand_in.exists)
        first = watcher.pid
        os.kill(first, signal.SIGSTOP)
        await until(lambda: watcher.pid not in (None, first))

    watched(test, patience_s=0.5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_ending_a_stopped_process_takes_no_patience(when: str) -> None:
    async def test(watcher: Watcher) -> None:
        pid = watcher.pid
        if when == "before":
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: is_stopped(pid))
        ending = asyncio.create_task(watcher.stop(100 * PATIENCE_S))
        if when == "meanwhile":
            await asyncio.sleep(0)  # It begins to wait.
            os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE_S):
            await ending

    watched(test)


@pytest.mark.parametrize("how", ["abort", "error", "connection lost", "killed", "terminated"])
def test_pauses_grow_where_a_process_ends_by_itself_not_where_it_is_killed(
    stand_in: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    does, _ = ENDS[how]
    (stand_in.parent / "stand_in.py").write_text(f"import os\n{does}\n")
    monkeypatch.setattr(processes, "HEALTHY_S", PATIENCE_S)

    async def test(_: Watcher) -> None:
        await until(lambda: len(caplog.records) >= 4)

    watched(test)
    pauses = [record.args[-1] for record in caplog.records[:4]]
    by_itself = how not in ("killed", "terminated")
    assert pauses == ([0.01, 0.02, 0.04, 0.08] if by_itself else [0.01] * 4)


def test_a_process_that_fails_before_it_ever_joined_is_not_started_again_however_long_it_loaded(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in.parent / "stand_in.py").write_text(f"import os\nos._exit({EXIT_ERROR})\n")
    monkeypatch.setattr(processes, "HEALTHY_S", 0.0)

    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ReplicaLostError, match="cannot be started"):
                await Watcher(SPEC, {}, 1000.0).run(lambda: False)

    asyncio.run(main())


@pytest.mark.parametrize("when", ["bound to it", "stopped by then", "stopped before"])
def test_a_process_ends_with_its_parent(
    stand_in: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "stopped before":
        monkeypatch.setenv("STOPS_FIRST", "1")
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        if when == "stopped before":
            wait_until(lambda: is_stopped(child.pid))
        else:
            wait_until(stand_in.exists)
        if when == "stopped by then":
            child.suspend()
        parent.kill()
        parent.wait()
        wait_until(lambda: not is_alive(child.pid))
    finally:
        parent.kill()
        with suppress(psutil.NoSuchProcess):
            child.kill()
