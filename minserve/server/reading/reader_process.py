"""`ReaderProcess`: calls of a `Reader` in a process of its own, the shortest bodies first."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from minserve.server.errors import HttpError, unavailable
from minserve.server.reading import frames
from minserve.server.reading.reader import Facts

log = logging.getLogger(__name__)

# Seconds for one body. The longest that a model takes needs one or two of a core, which the nicest
# process gets in a minute where all cores decode.
PATIENCE_S = 300.0


@dataclass(order=True, slots=True)
class _PendingRead:
    """A call that waits, with the size of its body in bytes, by which jobs are sorted."""

    size: int
    number: int
    frame: bytes = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)


class ReaderProcess:
    """Keeps the process running, and gives it one call after the other.

    The process is started at the first call, and again after it has ended. All methods belong to
    one event loop.

    Args:
        niceness: of the process, above that of this one; 19 at most.
    """

    def __init__(self, facts: Facts, niceness: int) -> None:
        self._facts = facts
        self._niceness = niceness
        self._jobs: asyncio.PriorityQueue[_PendingRead] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._process: asyncio.subprocess.Process | None = None
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process, so that no request has to wait for its start."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())

    async def call(self, method: str, args: tuple[Any, ...], size: int) -> Any:
        """Call a method of the `Reader`.

        Args:
            size: of the body in bytes.

        Raises:
            HttpError: 500 if the process died of it, 503 if it took too long or no process can be
                started.
            Exception: whatever the method raises.
        """
        self.start()
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        frame = frames.pack((method, args))
        self._jobs.put_nowait(_PendingRead(size, next(self._numbers), frame, result))
        return await result

    async def close(self) -> None:
        """End the process. Calls that wait are cancelled."""
        if self._serving is not None:
            self._serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        while not self._jobs.empty():
            self._jobs.get_nowait().result.cancel()
        await self._end()

    async def _serve(self) -> None:
        """Run one job after the other."""
        with contextlib.suppress(HttpError):  # the first job tries again
            await self._running()
        while True:
            job = await self._jobs.get()
            if job.result.done():
                continue  # its client has gone
            try:
                is_good, value = await self._run(job.frame)
            except Exception as error:
                is_good, value = False, error
            except asyncio.CancelledError:
                job.result.cancel()
                raise
            if job.result.done():
                continue
            if is_good:
                job.result.set_result(value)
            else:
                job.result.set_exception(value)

    async def _run(self, frame: bytes) -> tuple[bool, Any]:
        """Have the process carry out a call; it does not survive one that fails."""
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                process.stdin.write(frame)
                await process.stdin.drain()
                head = await process.stdout.readexactly(frames.LENGTH.size)
                (length,) = frames.LENGTH.unpack(head)
                is_good, value, is_stuck = frames.unpack(await process.stdout.readexactly(length))
        except TimeoutError:
            await self._end()
            log.error("a request was given up: reading it took more than %g s", PATIENCE_S)
            raise HttpError(
                503,
                f"reading this request took more than {PATIENCE_S:g} s; send less text",
                kind="server_error",
            ) from None
        except (OSError, EOFError):
            await self._end()
            log.error("the process that reads requests ended with code %s", process.returncode)
            raise HttpError(
                500, "the process that read this request has ended", kind="server_error"
            ) from None
        if is_stuck:
            await self._end()
        return is_good, value

    async def _running(self) -> asyncio.subprocess.Process:
        """Return the process, started if there is none.

        Raises:
            HttpError: 503 if it cannot be started, for want of memory or file descriptors.
        """
        process = self._process
        if process is None or process.returncode is not None:
            try:
                process = self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "minserve.server.reading.child",
                    str(self._niceness),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                )
            except OSError as error:
                log.error("the process that reads requests cannot be started: %s", error)
                raise unavailable(
                    "this request is too long to be read now; try again later"
                ) from None
            assert process.stdin is not None
            process.stdin.write(frames.pack(self._facts))
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
