"""The edge of the server: what every request passes through before its handler, in this order.

A line of log; an answer to every error; HTTP's version; ``Host``, origins and preflights; the API key; the limits
of each client; the time for the body. Each check is cheap, and none of them reads a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from minserve.server.browsers import BrowserRules
from minserve.server.errors import error_response, to_http_error
from minserve.server.keys import KeyRing
from minserve.server.limits import ClientLimits, refuse_unspoken_versions
from minserve.server.request_ids import add_request_id
from minserve.server.request_log import RequestLog
from minserve.server.request_record import note_disconnect, note_error, note_status
from minserve.server.routes import Handler
from minserve.server_config import ServerConfig


class Edge:
    """The middlewares and signals of an application, outermost first.

    Raises:
        ConfigError: if the file of API keys cannot be used, or traces are wanted and cannot be made.
    """

    def __init__(self, config: ServerConfig) -> None:
        browsers, keys, limits = BrowserRules(config), KeyRing(config), ClientLimits(config)
        log = RequestLog(config)
        self.middlewares: Sequence[Middleware] = (
            log.watch,
            answer_errors,
            refuse_unspoken_versions,
            browsers.check,
            keys.check,
            limits.count,
            limits.bound_body,
        )
        self.close = log.close
        self.signals = (add_request_id, note_status, browsers.add_headers)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every failure into OpenAI's JSON error.

    Raises:
        ConnectionError: where an answer has begun; breaking it off is all that tells of the failure.
    """
    try:
        return await handler(request)
    except (ConnectionError, asyncio.CancelledError):
        note_disconnect(request)
        raise  # the client has closed the connection, so no answer can be sent
    except Exception as error:
        told = to_http_error(error)
        note_error(request, told)
        if request.writer.output_size > 0:
            raise ConnectionAbortedError(told.message) from error
        response = error_response(told)
        if request.content.exception() is not None:
            response.force_close()  # the rest of the body cannot be told from a next request
        return response
