"""`Watcher`: keeps the processes of this machine's replicas running.

A process that ends is started again: soon if it had lived for a while or was killed from outside,
else after a pause that doubles. A process that hangs would end by itself when it wakes, but that
may be late: once the controller has given it up, it is killed, since its device and memory are
needed. So is one that somebody stops before it has joined, of which the controller knows nothing
yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minserve.controller.replica_process import ReplicaSpec
from minserve.errors import ReplicaLostError, ReplicaRefusedError
from minserve.exit_codes import EXIT_AGAIN, EXIT_ERROR, EXIT_REFUSED
from minserve.process_ends import is_fault, is_stopped, num_oom_kills, words_of

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
# A process that lived for so many seconds had started well.
HEALTHY_S = 10.0
STOP_S = 10.0
# Seconds from the loss of a connection to the end of its process, where that ends by itself.
END_S = 2.0
# Seconds between looks at whether a process is stopped.
LOOK_S = 0.25
# The module that is a replica's process.
MODULE = "minserve.controller.replica_process"


@dataclass(frozen=True, slots=True)
class _Life:
    """A process, with the number of out-of-memory kills on this machine when it started."""

    process: asyncio.subprocess.Process
    num_oom_kills: int

    @property
    def ended_by_fault(self) -> bool:
        """True if it crashed, ended with an error, or was killed for want of memory."""
        code = self.process.returncode
        return code is not None and is_fault(code, self.num_oom_kills)

    @property
    def was_killed(self) -> bool:
        """True if a signal from outside ended it, which says nothing against the next process."""
        code = self.process.returncode
        return code is not None and code < 0 and not self.ended_by_fault


class Watcher:
    """Keeps the process of one replica running.

    Args:
        environment: variables of the process in addition to this process's own.
        patience_s: a process that is stopped for so many seconds is killed.
    """

    def __init__(
        self, spec: ReplicaSpec, environment: Mapping[str, str], patience_s: float
    ) -> None:
        self.spec, self._patience_s = spec, patience_s
        self._environment = {**os.environ, **environment}
        # The present process and the one before, of whose end the controller may still ask.
        self._lives: deque[_Life] = deque(maxlen=2)
        self._began, self._stopping = 0.0, False

    @property
    def has_lived(self) -> bool:
        """True if the newest process began so long ago that it had started well."""
        return time.monotonic() - self._began > HEALTHY_S

    @property
    def pid(self) -> int | None:
        """The process's id; ``None`` while no process runs."""
        running = self._running
        return None if running is None else running.pid

    @property
    def _running(self) -> asyncio.subprocess.Process | None:
        """The process, while it runs."""
        process = self._lives[-1].process if self._lives else None
        return process if process is not None and process.returncode is None else None

    async def run(self, has_served: Callable[[], bool]) -> None:
        """Start the process, and again whenever it ends, until `stop` or until it ends with code 0.

        Args:
            has_served: returns whether this replica has ever joined. A process that ends before that
                with an error of its own has a lasting reason, however long it loaded: another try
                would fail in the same way.

        Raises:
            ReplicaLostError, ReplicaRefusedError: if the process cannot be started.
        """
        pause = FIRST_PAUSE_S
        while not self._stopping:
            self._began = time.monotonic()
            code = await self._run_once()
            if self._stopping or code == 0:
                return
            if code == EXIT_AGAIN:
                continue
            if code == EXIT_REFUSED:
                raise ReplicaRefusedError(f"replica {self.spec.index} differs from the others")
            if code == EXIT_ERROR and not has_served():
                raise ReplicaLostError(
                    f"replica {self.spec.index} cannot be started; see what it said above"
                )
            if self.has_lived or self._lives[-1].was_killed:
                pause = FIRST_PAUSE_S
            log.warning(
                "replica %d ended (%s); starting it again in %.1f s",
                self.spec.index,
                words_of(code),
                pause,
            )
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _run_once(self) -> int:
        before = num_oom_kills()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            self.spec.to_json(),
            str(os.getpid()),
            env=self._environment,
            # A group of its own, see `replica_process`.
            process_group=0,
        )
        self._lives.append(_Life(process, before))
        if self._stopping:
            self.kill()
        stopped_s = 0.0
        while True:
            if stopped_s > self._patience_s:
                self.kill()
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(process.wait(), LOOK_S)
            stopped_s = stopped_s + LOOK_S if is_stopped(process.pid) else 0.0

    def kill(self, pid: int | None = None) -> None:
        """Kill the process at once, if it has this id or none is given; `run` starts it again."""
        running = self._running
        if running is not None and pid in (None, running.pid):
            with contextlib.suppress(ProcessLookupError):
                running.kill()

    async def ended_by_fault(self, pid: int) -> bool:
        """Return whether a process whose connection is lost ended by a fault of its own.

        It has `END_S` seconds to end. One that does not, or is stopped, is killed: no fault.
        """
        life = next((one for one in self._lives if one.process.pid == pid), None)
        if life is None:
            return False
        await _ended(life.process, END_S)
        if life.process.returncode is None:
            self.kill(pid)
            return False
        return life.ended_by_fault

    async def await_end(self) -> None:
        """Wait for a process that was told to end; kill it after `STOP_S` seconds."""
        running = self._running
        if running is not None:
            await _ended(running, STOP_S)
            self.kill(running.pid)

    async def stop(self, patience_s: float = STOP_S) -> None:
        """End the process for good. The controller has told it to end; it is killed if it does not.

        Args:
            patience_s: seconds that it has to end by itself.
        """
        self._stopping = True
        running = self._running
        if running is not None:
            await _ended(running, patience_s)
        self.kill()


async def _ended(process: asyncio.subprocess.Process, patience_s: float) -> None:
    """Wait until a process has ended, but not for one that is stopped, also if only meanwhile."""
    deadline = time.monotonic() + patience_s
    while (rest_s := deadline - time.monotonic()) > 0 and not is_stopped(process.pid):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), min(LOOK_S, rest_s))
            return
