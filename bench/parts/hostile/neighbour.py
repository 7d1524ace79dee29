"""A well-behaved client beside the hostile ones: it streams greedy text without end, and compares.

What it measures is what a neighbour feels: other text, an error, or longer times between tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from parts.hostile.case import COMPLETIONS, Target
from parts.hostile.wire import ANSWER_S, WireAnswer, request_bytes

NEIGHBOUR_PROMPT = "Once upon a time, in a small town by the sea,"
# A connection that the server closed before it had answered: whoever has just come may ask again.
TURNED_AWAY = "its connection was closed before an answer"
# Pause before a request that was refused because the queue is full, in seconds.
RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of the neighbour's: when it ran, in seconds, and what was wrong with it."""

    began: float
    ended: float
    problem: str | None


@dataclass(slots=True)
class Neighbour:
    """A client that streams the same greedy text again and again.

    Attributes:
        tokens: of one stream.
        streams: what became of each of them.
        gaps: seconds between two events of a stream, of all of them.
    """

    target: Target
    tokens: int = 48
    streams: list[Stream] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    _text: str = ""
    _quiet: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def learn(self) -> None:
        """Learn the undisturbed text.

        Raises:
            RuntimeError: where it cannot be had.
        """
        text, problem = await self._stream()
        if problem or not text:
            raise RuntimeError(f"the undisturbed text cannot be had: {problem}")
        self._text = text
        self.gaps.clear()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Stream while the context lasts, until the end of the last stream."""
        going = asyncio.Event()
        going.set()
        task = asyncio.create_task(self._run(going))
        try:
            yield
        finally:
            going.clear()
            await task

    @asynccontextmanager
    async def silent(self) -> AsyncIterator[None]:
        """Ask for nothing while the context lasts, which begins when the present stream has ended."""
        async with self._quiet:
            yield

    def problem_between(
        self, began: float, ended: float, *, may_be_turned_away: bool = False
    ) -> str | None:
        """Return what was wrong with a stream that ran at some time within an interval.

        Args:
            may_be_turned_away: True where a close before the answer is no fault.
        """
        for stream in self.streams:
            if stream.problem == TURNED_AWAY and may_be_turned_away:
                continue
            if stream.problem and stream.began <= ended and stream.ended >= began:
                return stream.problem
        return None

    async def _run(self, going: asyncio.Event) -> None:
        while going.is_set():
            async with self._quiet:
                began = time.perf_counter()
                try:
                    text, problem = await self._stream()
                except (OSError, TimeoutError) as error:
                    text, problem = "", f"{type(error).__name__} {error}"
                if problem is None and text != self._text:
                    problem = f"its text became {text!r}, undisturbed it was {self._text!r}"
                if problem != "full":
                    self.streams.append(Stream(began, time.perf_counter(), problem))
            # Whoever waits for silence has its turn.
            await asyncio.sleep(RETRY_S if problem else 0)

    async def _stream(self) -> tuple[str, str | None]:
        """Return a stream's text and what is wrong with it; ``full`` where the queue was full."""
        target = self.target
        body: dict[str, Any] = {
            "prompt": NEIGHBOUR_PROMPT,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        key = [("Authorization", f"Bearer {target.key}")] if target.key else []
        data = request_bytes(target.address, "POST", COMPLETIONS, json.dumps(body).encode(), key)
        reader, writer = await target.address.connect()
        try:
            writer.write(data)
            status = await asyncio.wait_for(reader.readline(), ANSWER_S)
            if not status:
                return "", TURNED_AWAY
            if b" 200 " not in status:
                return "", "full" if b" 429 " in status else f"its stream was answered {status!r}"
            return await self._read(reader)
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, str | None]:
        """Read the events of a stream, whatever its headers and chunks are."""
        text, last = "", None
        while line := await asyncio.wait_for(reader.readline(), ANSWER_S):
            if line.startswith(b"data: [DONE]"):
                return text, None
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return text, f"its stream failed: {event['error']}"
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append(now - last)
                last = now
                text += event["choices"][0]["text"]
        return text, "its stream ended without [DONE]"


async def unquiet(target: Target) -> str | None:
    """Wait until a server has nothing left of any request; return what stays."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        left = await busy_gauges(target)
        if not left or time.monotonic() > deadline:
            return f"left behind: {left}" if left else None
        await asyncio.sleep(0.05)


async def busy_gauges(target: Target) -> dict[str, float]:
    """Return the gauges of requests and memory that are not 0."""
    answer: WireAnswer = await target.ask("GET", "/metrics")
    names = ("num_requests_running", "num_requests_waiting", "num_requests_unfinished",
             "kv_cache_usage_perc")  # fmt: skip
    found = {}
    for line in answer.body.decode().splitlines():
        name, _, value = line.rpartition(" ")
        if name.partition("{")[0].removeprefix("minserve:") in names and float(value):
            found[name] = float(value)
    return found if answer.status == 200 else {f"/metrics gave {answer}": 1.0}
