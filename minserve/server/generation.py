"""From the engine's handles to an HTTP answer, whole or streamed.

Nothing here aborts: whoever submitted the handles aborts them in a ``finally``, so that
a client that leaves, at whatever point, frees its KV.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from minserve.errors import EngineStoppedError, GenerationError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.engine_face import Handle
from minserve.server.errors import error_body, to_http_error
from minserve.server.protocol import GenerationCall
from minserve.server.responses import Reply
from minserve.server.sse import EventStream, dump_json


async def whole_response(reply: Reply, handles: Sequence[Handle]) -> web.Response:
    """Wait for every output and answer with one body.

    Raises:
        MinserveError: where one of the outputs failed.
    """
    deltas = []
    async with aclosing(merged(handles)) as stream:
        async for prompt, delta in stream:
            deltas.append((prompt, delta))
    return web.Response(body=dump_json(reply.body(deltas)), content_type="application/json")


async def streamed_response(
    request: web.Request,
    call: GenerationCall,
    reply: Reply,
    handles: Sequence[Handle],
    *,
    refusable: bool = False,
) -> web.StreamResponse:
    """Answer with server-sent events.

    A failure before the first event is raised, to be answered with its status; a later
    one becomes an error event after which the stream ends without ``[DONE]``.

    Args:
        refusable: the planner may still refuse an output that has not begun. So that this
            too is answered with a status, nothing is sent before all have begun. They
            share one TTFT, so the request's last first token comes no later by this.

    Raises:
        MinserveError: where an output failed before anything was sent.
        ConnectionResetError: where the client has gone.
    """
    events = EventStream(request)
    num_held = len(handles) * call.params.n if refusable else 0
    begun: set[tuple[int, int]] = set()
    held: list[dict[str, Any]] = []
    try:
        async with aclosing(merged(handles)) as stream:
            async for prompt, delta in stream:
                begun.add((prompt, delta.index))
                held += reply.chunks(prompt, delta)
                if len(begun) >= num_held:
                    for chunk in held:
                        await events.send(chunk)
                    held.clear()
    except ConnectionError:
        raise
    except Exception as error:
        if not events.started:
            raise
        await events.fail(error_body(to_http_error(error)))
        return events.response
    if call.include_usage:
        await events.send(reply.usage_chunk())
    await events.done()
    return events.response


async def merged(handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, OutputDelta], None]:
    """Deltas of several handles as they come, with the position of their handle.

    Raises:
        MinserveError: as soon as one output of any handle has failed.
    """
    if len(handles) == 1:
        async for delta in handles[0]:
            _raise_failure(delta)
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, OutputDelta] | Exception | None] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(i, one, arrived)) for i, one in enumerate(handles)]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                _raise_failure(item[1])
                yield item
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(
    position: int,
    handle: Handle,
    arrived: asyncio.Queue[tuple[int, OutputDelta] | Exception | None],
) -> None:
    try:
        async for delta in handle:
            arrived.put_nowait((position, delta))
    except Exception as error:
        arrived.put_nowait(error)
    else:
        arrived.put_nowait(None)


def _raise_failure(delta: OutputDelta) -> None:
    """Nobody who still listens asked for an abort: it is a failure like any other."""
    if delta.finish_reason is FinishReason.ERROR:
        raise delta.error or GenerationError("generation failed")
    if delta.finish_reason is FinishReason.ABORT:
        raise delta.error or EngineStoppedError("the server is shutting down")
