"""Turn the outputs of the engine's handles into an HTTP answer, whole or streamed.

No function here aborts a handle. The function that submitted the handles aborts them in a
``finally``, so that the KV of a client that leaves is freed wherever the answer stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
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
    """Wait for every output and return one response with all of them.

    Raises:
        MinserveError: if one of the outputs failed.
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
    limit: AbstractAsyncContextManager[None],
    *,
    refusable: bool = False,
) -> web.StreamResponse:
    """Answer with server-sent events.

    A failure before the first event is raised, so that its HTTP status can be sent. A later
    failure becomes an error event, after which the stream ends without ``[DONE]``.

    Args:
        limit: ends the outputs when their time is over; see `minserve.server.limits.time_limit`.
        refusable: true where the planner may still refuse an output that has not begun. To answer
            such a refusal with a status, nothing is sent before all outputs have begun. The
            outputs share one TTFT, so the request's last first token comes no later by this.

    Raises:
        MinserveError: if an output failed before anything was sent.
        ConnectionResetError: if the client has closed the connection.
    """
    events = EventStream(request)
    num_held = len(handles) * call.params.n if refusable else 0
    begun: set[tuple[int, int]] = set()
    held: list[dict[str, Any]] = []
    try:
        async with limit, aclosing(merged(handles)) as stream:
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
    """Yield the deltas of several handles as they come, each with the position of its handle.

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
    """Raise the error of a failed or aborted output.

    A client that is still connected asked for no abort, so an abort is a failure to it too.
    """
    if delta.finish_reason is FinishReason.ERROR:
        raise delta.error or GenerationError("generation failed")
    if delta.finish_reason is FinishReason.ABORT:
        raise delta.error or EngineStoppedError("the server is shutting down")
