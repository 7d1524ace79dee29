"""`Watcher`: keeps the processes of this machine's replicas running.

One that ends is started again, at once if it had served for a while, else after a pause that
doubles. One that hangs ends itself when it wakes, but nobody waits for that: once the
controller has given it up, it is killed, since its device and memory are needed.
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

from minserve.controller.replica import ReplicaSpec
from minserve.errors import ReplicaLostError, ReplicaRefusedError
from minserve.exit_codes import EXIT_AGAIN, EXIT_ERROR, EXIT_REFUSED

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
# One that lived so long had started well.
HEALTHY_S = 10.0
STOP_S = 10.0


class Watcher:
    """Watches over one replica's process.

    Args:
        environment: of the process, beside this one's own.
    """

    def __init__(self, spec: ReplicaSpec, environment: Mapping[str, str]) -> None:
        self.spec = spec
        self._environment = {**os.environ, **environment}
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Of the process, where one runs."""
        running = self._running
        return None if running is None else running.pid

    @property
    def _running(self) -> asyncio.subprocess.Process | None:
        """The process, while it runs."""
        process = self._process
        return process if process is not None and process.returncode is None else None

    async def run(self, has_served: Callable[[], bool]) -> None:
        """Start the process, and again whenever it ends, until `stop`, or until the controller
        wants no more of it.

        Args:
            has_served: whether this replica was ever taken in: what fails before that is no
                accident, and another try would fail alike.

        Raises:
            ReplicaLostError, ReplicaRefusedError: where it cannot be started.
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
            "minserve.controller.replica",
            self.spec.to_json(),
            env=self._environment,
        )
        return await self._process.wait()

    def kill(self) -> None:
        """End the process now; it is started again."""
        running = self._running
        if running is not None:
            with contextlib.suppress(ProcessLookupError):
                running.kill()

    async def await_end(self) -> None:
        """The process was told to end; one that does not is killed."""
        running = self._running
        if running is None:
            return
        try:
            await asyncio.wait_for(running.wait(), STOP_S)
        except TimeoutError:
            self.kill()

    async def stop(self, patience_s: float = STOP_S) -> None:
        """End it for good. It has been told so by its controller, and is killed if it dawdles.

        Args:
            patience_s: for it to end by itself.
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
