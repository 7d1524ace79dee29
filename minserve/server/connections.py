"""Connections: what happens on one before and after its handlers, and how long it may take.

aiohttp parses HTTP and calls the handlers. Here its refusals become OpenAI's JSON errors with one
line of log, and clients that are too slow lose their connection: with their headers, with reading
what they asked for, or by doing nothing at all. A body's time is kept in `minserve.server.limits`,
for a handler waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader

from minserve.server.errors import HttpError, error_body, error_response, to_http_error
from minserve.server.json_array import dump_json
from minserve.server.malformed import MAX_HEADER_BYTES, MAX_HEADERS, MAX_URI_BYTES, refusal_of
from minserve.server.request_ids import HEADER as REQUEST_ID
from minserve.server.request_ids import new_request_id
from minserve.server.throttled_log import ThrottledLog
from minserve.server_config import ServerConfig

logger = logging.getLogger(__name__)

# How long the rest of a body is read and thrown away once its request has been answered, so that
# the client gets to read the answer.
LINGER_S = 5.0
# A peer that has vanished is noticed after about KEEPALIVE_IDLE_S + 3 * KEEPALIVE_INTERVAL_S,
# though nothing is sent while its prompt waits.
KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 10
# Set for a request whose HTTP version is not spoken here; it is answered in HTTP/1.1.
UNSUPPORTED_VERSION = web.RequestKey("unsupported_version", bool)
# The method of aiohttp's stand-in for a request that was refused by the parser.
REFUSED_METHOD = "UNKNOWN"
SPOKEN: tuple[HttpVersion, ...] = (HttpVersion10, HttpVersion11)


class Connection(web.RequestHandler):
    """One client's connection, with its timers."""

    __slots__ = ("_config", "_header_timer", "_is_partial", "_log", "_request", "_send_timer")

    def __init__(
        self,
        server: ConnectionServer,
        config: ServerConfig,
        log: ThrottledLog,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=config.keep_alive_s,
            logger=logger,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None, and writes no log
            max_line_size=MAX_URI_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            lingering_time=LINGER_S,
            # Compressed bodies are refused, so aiohttp must not unpack them first.
            auto_decompress=False,
        )
        self._config = config
        self._log = log
        self._request: web.BaseRequest | None = None
        self._is_partial = False  # some bytes of a request have come, but not all its headers
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def begin(self, request: web.BaseRequest) -> None:
        """Note that a request's headers are complete and its handler is about to run."""
        self._request = request
        self._is_partial = False
        self._stop_header_timer()

    # --- what the transport tells ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        _keep_alive(transport.get_extra_info("socket"), self._config.send_timeout_s)
        self._start_header_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_header_timer()
        self._stop_send_timer()
        super().connection_lost(exc)
        self._request = None

    def data_received(self, data: bytes) -> None:
        if self._request is None and data:
            self._is_partial = True
            self._start_header_timer()
        try:
            super().data_received(data)
        except Exception as error:  # a URI can be such that its parser fails otherwise than HTTP's
            self._refuse(refusal_of(error))
            return
        # A body may turn out to be malformed while its handler waits for more of it.
        refused = getattr(self._messages[-1][0], "exc", None) if self._messages else None
        if refused is not None and self._request is not None:
            self._request.content.set_exception(refusal_of(refused))

    def pause_writing(self) -> None:
        """Give the client a limited time to read what is buffered for it."""
        super().pause_writing()
        if self.transport is not None:
            self._send_timer = self._loop.call_later(
                self._config.send_timeout_s, self._give_up_sending, self.transport
            )

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    # --- what aiohttp calls ---

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is left of a response. A refusal from before all middlewares becomes JSON."""
        if isinstance(resp, web.HTTPException):
            resp = error_response(to_http_error(resp))
            resp.force_close()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._request = None
            if isinstance(self._manager, ConnectionServer):
                self._manager.note_idle(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to what the parser refused, or to a mistake outside the middlewares.

        Raises:
            ConnectionError: where an answer has begun, so that none can be sent.
        """
        if exc is not None and status < 500:
            error = refusal_of(exc)
            self._log.warning(
                "refused a request from %s: %d, %s", request.remote, error.status, error.message
            )
        else:
            error = to_http_error(exc if isinstance(exc, Exception) else RuntimeError(message))
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun; another one cannot be sent")
        response = error_response(error)
        response.headers[REQUEST_ID] = new_request_id()
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """Log a mistake of the server; what is the client's doing was logged or answered before."""
        if not isinstance(kwargs.get("exc_info"), HttpError | web.RequestPayloadError):
            super().log_exception(*args, **kwargs)

    # --- timers ---

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self._loop.call_later(
                self._config.header_timeout_s, self._give_up_headers
            )

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _give_up_headers(self) -> None:
        self._header_timer = None
        if self._request is not None or self._messages:
            return
        if self._is_partial:
            limit = self._config.header_timeout_s
            self._refuse(HttpError(408, f"the headers were not complete after {limit:g} s"))
        else:
            self.force_close()

    def _give_up_sending(self, transport: asyncio.Transport) -> None:
        self._send_timer = None
        self._log.warning(
            "%s reads too slowly: closed its connection with %d bytes unsent",
            _address(transport),
            transport.get_write_buffer_size(),
        )
        transport.abort()  # its handler is cancelled, which frees the KV

    def _refuse(self, error: HttpError) -> None:
        """End the connection, with an answer where none is on its way."""
        if self._request is not None:
            self._request.content.set_exception(error)
            self.close()
            return
        if self.transport is not None:
            self._log.warning(
                "refused a request from %s: %d, %s",
                _address(self.transport),
                error.status,
                error.message,
            )
            self.transport.write(plain_response(error))
        self.force_close()


class ConnectionServer(web.Server):
    """Makes the connections, and knows which of them are idle.

    Args:
        inner: aiohttp's own server of the application, whose handler and requests are used.
    """

    def __init__(self, inner: web.Server, config: ServerConfig) -> None:
        super().__init__(
            inner.request_handler,
            request_factory=self._begin,  # type: ignore[arg-type]  # its protocols are Connections
            # A client that leaves cancels its handler, whose finally frees the KV.
            handler_cancellation=True,
        )
        self.log = ThrottledLog(logger)
        self.num_open = 0
        self._config = config
        self._make = inner.request_factory
        self._loop = asyncio.get_running_loop()
        self._idle: dict[web.RequestHandler, None] = {}  # the longest idle one first

    def __call__(self) -> Connection:
        return Connection(self, self._config, self.log, self._loop)

    @property
    def num_idle(self) -> int:
        """Connections on which no request runs."""
        return len(self._idle)

    def note_idle(self, connection: Connection) -> None:
        """Note that a connection waits for its client's next request."""
        if connection.connected:
            self._idle[connection] = None

    def make_room(self) -> bool:
        """Close the connection that has been idle for longest; false if none is."""
        if not self._idle:
            return False
        connection = next(iter(self._idle))
        del self._idle[connection]
        if connection.transport is not None:
            connection.transport.abort()
        return True

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.num_open += 1
        self._idle[handler] = None

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self.num_open -= 1
        self._idle.pop(handler, None)

    def _begin(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: Connection,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        self._idle.pop(protocol, None)
        # What the parser refuses comes as a message of HTTP/1.0 with a method of its own.
        is_spoken = message.version in SPOKEN
        if not is_spoken or message.method == REFUSED_METHOD:
            message = message._replace(version=HttpVersion11, should_close=True)
        request = self._make(message, payload, protocol, writer, task)
        request[UNSUPPORTED_VERSION] = not is_spoken
        protocol.begin(request)
        return request


class ConnectionRunner(web.AppRunner):
    """aiohttp's runner of an application, with the connections of this module."""

    def __init__(self, app: web.Application, config: ServerConfig, shutdown_timeout: float) -> None:
        super().__init__(app, shutdown_timeout=shutdown_timeout)
        self._config = config

    @property
    def connections(self) -> ConnectionServer:
        """What makes the connections, once the runner is set up."""
        assert isinstance(self.server, ConnectionServer)
        return self.server

    async def _make_server(self) -> ConnectionServer:
        return ConnectionServer(await super()._make_server(), self._config)


def plain_response(error: HttpError) -> bytes:
    """Return the bytes of a whole answer, for a client of whom no request could be read."""
    body = dump_json(error_body(error))
    phrase = web.Response(status=error.status).reason
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "Connection": "close",
        REQUEST_ID: new_request_id(),
        **error.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {error.status} {phrase}\r\n{lines}\r\n".encode() + body


def _keep_alive(sock: socket.socket | None, send_timeout_s: float) -> None:
    """Let the system notice peers that have vanished, and those that take nothing more."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options: list[tuple[str, int]] = [
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", 3),
        # Bytes in the system's own buffer, once the server has no more to write.
        ("TCP_USER_TIMEOUT", max(1, int(send_timeout_s * 1e3))),
    ]
    for name, value in options:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _address(transport: asyncio.BaseTransport) -> str:
    peer: Callable[..., Any] | Any = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else "a client"
