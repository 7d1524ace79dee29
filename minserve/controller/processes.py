"""`Watcher`: keeps the processes of this machine's replicas running.

A process that ends is started again: at once if it had served for a while, else after a pause
that doubles. A process that hangs would end by itself when it wakes, but that may be late: once
the controller has given it up, it is killed, since its device and memory are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from minserve.controller.replica_loop import ReplicaSpec
from minserve.errors import ReplicaLostError, ReplicaRefusedError
from minserve.exit_codes import EXIT_AGAIN, EXIT_ERROR, EXIT_REFUSED

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
# A process that lived for so many seconds had started well.
HEALTHY_S = 10.0
STOP_S = 10.0


class Watcher:
    """Keeps the process of one replica running.

    Args:
        environment: variables of the process in addition to this process's own.
    """

    def __init__(self, spec: ReplicaSpec, environment: Mapping[str, str]) -> None:
        self.spec = spec
        self._environment = {**os.environ, **environment}
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The process's id; ``None`` while no process runs."""
        running = self._running
        return None if running is None else running.pid

    @property
    def _running(self) -> asyncio.subprocess.Process | None:
        """The process, while it runs."""
        process = self._process
        return process if process is not None and process.returncode is None else None

    async def run(self, has_served: Callable[[], bool]) -> None:
        """Start the process, and again whenever it ends, until `stop` or until it ends with code 0.

        Args:
            has_served: returns whether this replica has ever joined. A process that fails before
                that fails for a lasting reason, and another try would fail in the same way.

        Raises:
            ReplicaLostError, ReplicaRefusedError: if the process cannot be started.
        """
        pause = FIRST_PAUSE_S
        while not self._stopping:
            began = time.monotonic()
            code = await self._run_once()
            if self._stopping or code == 0:
                return
            if code == EXIT_AGAIN:
                continue
            if code == EXIT_REFUSED:
                raise ReplicaRefusedError(f"replica {self.spec.index} differs from the others")
            lived_s = time.monotonic() - began
            if code == EXIT_ERROR and lived_s < HEALTHY_S and not has_served():
                raise ReplicaLostError(
                    f"replica {self.spec.index} cannot be started; see what it said above"
                )
            pause = FIRST_PAUSE_S if lived_s > HEALTHY_S else pause
            log.warning(
                "replica %d ended (%s); starting it again in %.1f s",
                self.spec.index,
                _how(code),
                pause,
            )
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _run_once(self) -> int:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "minserve.controller.replica_loop",
            self.spec.to_json(),
            env=self._environment,
        )
        return await self._process.wait()

    def kill(self) -> None:
        """Kill the process at once; `run` starts it again."""
        running = self._running
        if running is not None:
            with contextlib.suppress(ProcessLookupError):
                running.kill()

    async def await_end(self) -> None:
        """Wait for a process that was told to end; kill it after `STOP_S` seconds."""
        running = self._running
        if running is None:
            return
        try:
            await asyncio.wait_for(running.wait(), STOP_S)
        except TimeoutError:
            self.kill()

    async def stop(self, patience_s: float = STOP_S) -> None:
        """End the process for good. The controller has told it to end; it is killed if it does not.

        Args:
            patience_s: seconds that it has to end by itself.
        """
        self._stopping = True
        running = self._running
        if running is None:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running.wait(), patience_s)
        self.kill()


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
