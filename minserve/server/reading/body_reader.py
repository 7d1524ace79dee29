"""`BodyReader`: reads short bodies at once, and leaves the others to processes of their own.

The event loop carries every stream, and the engine's thread shares the interpreter with it. So
nothing that grows with what a client sends may run in this process.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import ClientPayloadError, web
from multidict import CIMultiDict

from minserve.errors import InvalidRequestError
from minserve.server.errors import RETRY_AFTER, HttpError
from minserve.server.reading.reader import Endpoint, Facts, ReadCall, Reader
from minserve.server.reading.reader_process import ReaderProcess
from minserve.server.reading.structures import NotHereError

# Up to so many bytes, a body takes a few milliseconds at most.
SHORT = 2048
# Beyond so many bytes, a crowd of bodies would take a core from the model for seconds.
LONG = 2**18
# Reading leaves the cores to the model. Beside a model that decodes on all of them, 5 makes reading
# two or three times as long, and 19 a hundred times; and one that reads without end makes the model's
# steps 1.4 times as long with 5, and no longer with 19 (bench/hostile.py). Values between are worse
# than both: the process runs seldom, but then keeps its core.
NICENESS, NICENESS_OF_LONG = 5, 19
# Bodies that are received or wait to be read may have so many times the size of the largest one;
# short ones are taken all the same.
MOST_AT_ONCE = 16
_SLO_HEADERS = ("x-slo-", "x-llm-d-slo-")


class BodyReader:
    """Reads the bodies of requests.

    Args:
        most_bytes: of one body.
    """

    def __init__(self, facts: Facts, most_bytes: int) -> None:
        self._reader = Reader(facts, is_busy=True)
        self._process = ReaderProcess(facts, NICENESS)
        self._process_of_long = ReaderProcess(facts, NICENESS_OF_LONG)
        self._most_bytes = most_bytes
        self._num_bytes = 0

    def start(self) -> None:
        """Start the processes for bodies that are not short before the first one comes."""
        self._process.start()
        self._process_of_long.start()

    async def close(self) -> None:
        """End the processes."""
        await self._process.close()
        await self._process_of_long.close()

    async def generation(self, endpoint: Endpoint, request: web.Request) -> ReadCall:
        """Read the body of one that generates; raises what `Reader.generation` raises."""
        headers = CIMultiDict(
            (name, value)
            for name, value in request.headers.items()
            if name.lower().startswith(_SLO_HEADERS)
        )
        async with self._received(request) as raw:
            return await self._call("generation", raw, time.monotonic(), endpoint, headers)

    async def tokenized(self, request: web.Request) -> tuple[bytes, tuple[str, ...]]:
        """Answer the body of /tokenize; raises what `Reader.tokenized` raises."""
        async with self._received(request) as raw:
            return await self._call("tokenized", raw)

    async def detokenized(self, request: web.Request) -> bytes:
        """Answer the body of /detokenize; raises what `Reader.detokenized` raises."""
        async with self._received(request) as raw:
            return await self._call("detokenized", raw)

    async def _call(self, method: str, raw: bytes, *args: Any) -> Any:
        """Call a method of the `Reader`, here or in a process."""
        if len(raw) <= SHORT:
            with suppress(NotHereError):
                return getattr(self._reader, method)(raw, *args)
        process = self._process if len(raw) <= LONG else self._process_of_long
        return await process.call(method, (raw, *args), len(raw))

    @asynccontextmanager
    async def _received(self, request: web.Request) -> AsyncIterator[bytes]:
        """Receive a body, whose bytes count against those of all bodies until it is read.

        Raises:
            HttpError: 413 for a body over the limit, 415 for a compressed one, 429 if there are
                too many large ones at once.
            InvalidRequestError: if the client breaks off.
        """
        _check_head(request, self._most_bytes)
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.content.iter_any():
                size += len(part)
                self._num_bytes += len(part)
                if size > self._most_bytes:
                    raise _too_large(self._most_bytes)
                if size > SHORT and self._num_bytes > MOST_AT_ONCE * self._most_bytes:
                    raise HttpError(
                        429,
                        "too many large request bodies at once; try again later",
                        kind="rate_limit_error",
                        code="queue_full",
                        headers=RETRY_AFTER,
                    )
                parts.append(part)
            yield b"".join(parts)
        except (ClientPayloadError, web.RequestPayloadError) as error:
            raise InvalidRequestError(f"the request body could not be read: {error}") from None
        finally:
            self._num_bytes -= size


def _check_head(request: web.Request, most_bytes: int) -> None:
    """Check what a request's headers say of its body.

    Raises:
        HttpError: 413 for a body over the limit, 415 for a compressed one.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    transfer = request.headers.get("Transfer-Encoding", "chunked").strip().lower()
    if transfer != "chunked":  # aiohttp takes others too, as long as they end in it
        encoding = transfer
    if encoding not in ("", "identity"):
        # A few kilobytes can unpack to gigabytes; prompts are small enough to send plain.
        raise HttpError(415, f"request bodies must not be compressed ({encoding})")
    if request.content_length is not None and request.content_length > most_bytes:
        raise _too_large(most_bytes)


def _too_large(most_bytes: int) -> HttpError:
    return HttpError(413, f"the request body is larger than {most_bytes / 2**20:g} MiB")
