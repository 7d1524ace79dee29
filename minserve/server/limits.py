"""What one request, and one client's requests together, may take before anything is computed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from minserve.errors import RequestTimeoutError
from minserve.server.connections import UNSUPPORTED_VERSION
from minserve.server.errors import RETRY_AFTER, HttpError
from minserve.server.keys import KEY_NUMBER
from minserve.server.malformed import unsupported_version
from minserve.server.routes import Handler, computes
from minserve.server_config import ServerConfig


class ClientLimits:
    """Bounds the requests that one client has in flight, and the time for sending a body.

    Clients are told apart by their API keys, and without keys by their addresses.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._most = config.max_requests_per_key
        self._body_timeout_s = config.body_timeout_s
        self._in_flight: Counter[int | str | None] = Counter()

    @web.middleware
    async def count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run a handler if its client has fewer requests in flight than it may have.

        Raises:
            HttpError: 429 otherwise.
        """
        if self._most is None or not computes(request):
            return await handler(request)
        client = request.get(KEY_NUMBER, request.remote)
        # Nothing comes between this check and the count.
        if self._in_flight[client] >= self._most:
            whose = "API key" if KEY_NUMBER in request else "address"
            raise HttpError(
                429,
                f"this {whose} has {self._most} requests in flight, the most that it may have",
                kind="rate_limit_error",
                code="too_many_requests",
                headers=RETRY_AFTER,
            )
        self._in_flight[client] += 1
        try:
            return await handler(request)
        finally:
            self._in_flight[client] -= 1
            if not self._in_flight[client]:
                del self._in_flight[client]

    @web.middleware
    async def bound_body(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run a handler, whose reading of the body fails with 408 when that takes too long.

        Raises:
            HttpError: 411 where a body must follow and nothing says where it ends.
        """
        if not computes(request):
            return await handler(request)
        if not request.body_exists and "Content-Length" not in request.headers:
            raise HttpError(411, "send a JSON body and its Content-Length")
        limit = self._body_timeout_s
        error = HttpError(408, f"the body was not complete after {limit:g} s")
        timer = asyncio.get_running_loop().call_later(limit, request.content.set_exception, error)
        request.content.on_eof(timer.cancel)
        try:
            return await handler(request)
        finally:
            timer.cancel()


@web.middleware
async def refuse_unspoken_versions(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 505 to a request line without a version, or with one that is not spoken here."""
    if request.get(UNSUPPORTED_VERSION):
        raise unsupported_version()
    return await handler(request)


@asynccontextmanager
async def time_limit(seconds: float | None, began_s: float) -> AsyncIterator[None]:
    """Let a block run until a request has taken so long.

    Args:
        seconds: the most; ``None`` for no limit.
        began_s: when the request began, by the monotonic clock, which is the event loop's too.

    Raises:
        RequestTimeoutError: when the time is over.
    """
    try:
        async with asyncio.timeout_at(None if seconds is None else began_s + seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise RequestTimeoutError(
            f"the request took longer than the {seconds:g} s that this server allows; ask for "
            "fewer tokens"
        ) from None
