"""Clients that are slow, leave, come in crowds, or call themselves by another's name."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import psutil

from parts.hostile.case import COMPLETIONS, PROMPT, HostileCase, Target, refusal_problem
from parts.hostile.wire import WireAnswer, exchange, read_answer, request_bytes

NAME = "connections"
TEN_TOKENS = {"prompt": PROMPT, "max_tokens": 10, "temperature": 0, "ignore_eos": True}
SLOW_S = 4.0
STORM, STORM_TOKENS = 200, 4000
CROWD = 300
# Seconds for a crowd's connections: a full backlog makes the system try again after seconds.
CROWD_S = 90.0


def _generation(target: Target, tokens: int, **fields: Any) -> bytes:
    """Return a request for a stream of so many tokens, at most what the model takes."""
    most = min(tokens, target.limits.max_model_len - 100)
    body = {**TEN_TOKENS, "max_tokens": most, "stream": True, **fields}
    key = [("Authorization", f"Bearer {target.key}")] if target.key else []
    return request_bytes(target.address, "POST", COMPLETIONS, json.dumps(body).encode(), key)


@asynccontextmanager
async def _crowd(target: Target, count: int) -> AsyncIterator[list[Any]]:
    """Open connections, and drop them when the context ends."""
    async with AsyncExitStack() as stack:
        opened = await asyncio.gather(*(target.address.connect() for _ in range(count)))
        for _, writer in opened:
            stack.callback(writer.transport.abort)
        yield opened


async def _drip(writer: asyncio.StreamWriter, data: bytes, seconds: float) -> None:
    """Send one byte a tenth of a second, for a time."""
    with suppress(OSError):
        for i in range(min(len(data), round(seconds * 10))):
            writer.write(data[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0.1)


async def _health_problem(target: Target) -> str | None:
    answer = await target.ask("GET", "/health")
    return None if answer.status == 200 else f"/health gave {answer} meanwhile"


async def _slow_senders(target: Target, data: bytes) -> str | None:
    """Send requests byte by byte on fifty connections: nobody else waits for them."""
    async with _crowd(target, 50) as crowd:
        dripping = asyncio.gather(*(_drip(writer, data, SLOW_S) for _, writer in crowd))
        problem = await _health_problem(target)
        await target.generate(TEN_TOKENS)
        await dripping
    return problem


async def _slow_heads(target: Target) -> str | None:
    return await _slow_senders(target, _generation(target, 10))


async def _slow_bodies(target: Target) -> str | None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n"
    host = target.address.host_header.encode()
    async with _crowd(target, 50) as crowd:
        for _, writer in crowd:
            writer.write(head % host + b"Content-Length: 100000\r\n\r\n")
        dripping = asyncio.gather(*(_drip(w, b'{"prompt": "' * 10, SLOW_S) for _, w in crowd))
        problem = await _health_problem(target)
        await target.generate(TEN_TOKENS)
        await dripping
    return problem


async def _slow_readers(target: Target) -> str | None:
    """Read long streams by one byte a second, thirty at a time, and leave them unread."""

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_generation(target, STORM_TOKENS))
        for _ in range(round(SLOW_S)):
            await reader.read(1)
            await asyncio.sleep(1.0)

    async with _crowd(target, 30) as crowd:
        reading = asyncio.gather(*(read(reader, writer) for reader, writer in crowd))
        problem = await _health_problem(target)
        await target.generate(TEN_TOKENS)
        await reading
    return problem


async def _half_open(target: Target) -> str | None:
    """Send a whole request and close the sending half: it is answered, or the connection ends."""
    answer: WireAnswer = await exchange(
        target.address, _generation(target, 10, stream=False), half_close=True
    )
    return None if answer.status in (0, 200) else f"expected 200 or a close, came {answer}"


async def _opened_and_dropped(target: Target) -> str | None:
    async with asyncio.timeout(CROWD_S), _crowd(target, CROWD):
        return await _health_problem(target)


async def _dropped_with_reset(target: Target) -> str | None:
    """Send half a request on many connections, and reset them instead of closing them."""
    half = _generation(target, 10)[:60]
    async with asyncio.timeout(CROWD_S), _crowd(target, CROWD) as crowd:
        for _, writer in crowd:
            writer.write(half)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return await _health_problem(target)


async def _asked_and_dropped(target: Target) -> str | None:
    """Ask for whole answers on many connections, and drop them at once."""
    data = _generation(target, STORM_TOKENS, stream=False)
    async with _crowd(target, 100) as crowd:
        for _, writer in crowd:
            writer.write(data)
            await writer.drain()
    return await _health_problem(target)


async def _more_than_descriptors(target: Target) -> str | None:
    """Open more connections than the server may have descriptors; it goes on when they are gone."""
    assert target.pid is not None
    process = psutil.Process(target.pid)
    before = resource.prlimit(target.pid, resource.RLIMIT_NOFILE)
    few = process.num_fds() + 40
    resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        async with asyncio.timeout(CROWD_S), _crowd(target, 200):
            await asyncio.sleep(2.0)
            if not process.is_running():
                return "the server has ended"
    finally:
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, before)
    return await _health_problem(target)


async def _abort_storm(target: Target) -> str | None:
    """Ask for 200 streams of 4000 tokens, drop all once they have begun, and ask for ten tokens.

    Sets the figure ``ten_tokens_after_storm_s``.
    """
    data = _generation(target, STORM_TOKENS)
    async with _crowd(target, STORM) as crowd:
        for _, writer in crowd:
            writer.write(data)
            await writer.drain()
        # The first has begun; the others wait or run.
        first = await asyncio.wait_for(crowd[0][0].readline(), CROWD_S)
    if b" 200 " not in first:
        return f"expected a stream, came {first!r}"
    began = time.perf_counter()
    await target.generate(TEN_TOKENS)
    target.figures["ten_tokens_after_storm_s"] = round(time.perf_counter() - began, 2)
    return None


async def _full_queue(target: Target) -> str | None:
    """Fill the queue with one request for each engine: the next is refused with 429, not the one after."""
    n = 64
    data = _generation(target, STORM_TOKENS, prompt=[PROMPT] * (target.limits.max_queue // n), n=n)
    async with _crowd(target, target.replicas + 1) as crowd:
        for _, writer in crowd:
            writer.write(data)
            await writer.drain()
        answers = await asyncio.gather(*(_first(reader) for reader, _ in crowd))
    refused = [one for one in answers if one is not None]
    if not refused:
        return f"{len(crowd)} requests that each fill a queue were all taken"
    for one in refused:
        if problem := refusal_problem(one, 429):
            return problem
        if "retry-after" not in one.headers:
            return "429 came without Retry-After"
    return None


async def _first(reader: asyncio.StreamReader) -> WireAnswer | None:
    """Return a refusal; ``None`` if the request was not refused within seconds."""
    try:
        async with asyncio.timeout(SLOW_S):
            return await read_answer(reader)
    except TimeoutError:
        return None


async def _colliding_ids(target: Target) -> str | None:
    """Use one id and one salt for different requests at once: each gets its own text."""
    prompts = [f"The number {number} is" for number in ("one", "two", "three", "four")]
    bodies = [{**TEN_TOKENS, "prompt": prompt, "cache_salt": "x"} for prompt in prompts]
    alone = [await target.generate(body) for body in bodies]
    same = [("x-request-id", "0" * 32)]
    for more in ({}, {"request_id": "0" * 32}):
        at_once = await asyncio.gather(
            *(target.generate({**body, **more}, same) for body in bodies * 4)
        )
        if at_once != alone * 4:
            return f"requests of one id got texts of each other: {at_once[:4]} for {alone}"
    return None


async def _template_is_no_code(target: Target) -> str | None:
    """Send what looks like a template in a message: it comes out as it went in."""
    text = "{{ 7 * 7 }}{% set x = 5 %}{# no #}"
    body = {"messages": [{"role": "user", "content": text}]}
    tokens = (await target.ask("POST", "/tokenize", body)).json()["tokens"]
    back = (await target.ask("POST", "/detokenize", {"tokens": tokens})).json()["prompt"]
    return None if text in back else f"the message {text!r} became {back!r}"


def cases() -> list[HostileCase]:
    """Return all cases of connections, the gentle ones first."""
    return [
        HostileCase("harmless", "a template in a message is a text", _template_is_no_code),
        HostileCase(NAME, "ids that collide", _colliding_ids),
        HostileCase(NAME, "half open", _half_open),
        HostileCase(NAME, f"{CROWD} opened and dropped", _opened_and_dropped, alone=True),
        HostileCase(NAME, f"{CROWD} reset in the middle of a head", _dropped_with_reset, alone=True),
        HostileCase(NAME, "100 asked and dropped", _asked_and_dropped, alone=True),
        HostileCase(NAME, "50 slow heads", _slow_heads, alone=True, slow=True),
        HostileCase(NAME, "50 slow bodies", _slow_bodies, alone=True, slow=True),
        HostileCase(NAME, "30 slow readers", _slow_readers, alone=True, slow=True),
        HostileCase(NAME, "a full queue", _full_queue, alone=True, slow=True),
        HostileCase(NAME, "more connections than descriptors", _more_than_descriptors, alone=True,
             slow=True, crowded=True, needs="pid"),
        HostileCase(NAME, f"{STORM} streams of {STORM_TOKENS} tokens dropped", _abort_storm, alone=True,
             slow=True),
    ]  # fmt: skip
