"""A server process from its socket to its exit code.

The socket is bound before the model loads, so that a busy port costs a second and not
a minute. While the model loads, every answer is 503. The first SIGTERM or SIGINT stops
admission, lets running requests finish within a time, and fails the rest; a second
signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from minserve.errors import ConfigError
from minserve.sampling_params import default_words
from minserve.server.app import Server
from minserve.server.engine_face import EngineFace
from minserve.server.listener import Listener, allow_connections
from minserve.server.page.front_page import example_command
from minserve.server.watchdog import until_given_up
from minserve.server_config import ServerConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Ended(NamedTuple):
    """How a server ended.

    Attributes:
        signal_number: the signal that ended it; ``None`` where its engine was given up.
        hangs: True if an iteration is still under way, in a thread that nothing can end.
    """

    signal_number: int | None
    hangs: bool


BACKLOG = 1024
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LoadInterrupted(Exception):
    """A signal came while the model was loading, in a thread that cannot be stopped."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def bind_socket(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Args:
        port: 0 takes a free port.

    Raises:
        ConfigError: if the address is taken, unknown or not allowed.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Two sockets may bind one port until one of them listens; so listen at once.
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    sock.setblocking(False)
    return sock


async def serve(
    sock: socket.socket,
    config: ServerConfig,
    load_engine: Callable[[], EngineFace],
    announce: Callable[[EngineFace, str], None],
) -> Ended:
    """Serve until a signal comes, or the engine has to be given up.

    Args:
        sock: a listening socket; closed at the end.
        load_engine: makes the engine; blocks, and runs in its own thread.
        announce: called with the engine and the model's name once requests are served.

    Raises:
        MinserveError: if the model cannot be loaded.
        LoadInterrupted: if a signal came before the model was loaded.
    """
    server = Server(config)
    runner = server.create_runner()
    await runner.setup()
    listener = Listener(sock, runner.connections, allow_connections(config.max_connections))
    ended = _first_signal()
    try:
        engine = await _unless(ended, _in_thread(load_engine))
        starting = asyncio.ensure_future(engine.start())
        try:
            await _unless(ended, starting)
        except LoadInterrupted:
            starting.cancel()
            await engine.stop()
            raise
        # The loaded objects stay to the end. A garbage collection that goes through all of them
        # would stop every stream for 0.1 s now and then.
        gc.collect()
        gc.freeze()
        patience_s = 0.0
        try:
            server.engine = engine
            server.start_reading()
            if defaults := engine.sampling_defaults:
                logger.info(
                    "sampling defaults from the model's generation_config.json: %s",
                    default_words(defaults),
                )
            announce(engine, config.served_model_name or engine.model_name)
            await _ended_or_given_up(engine, config, ended)
            server.draining = True
            patience_s = config.shutdown_timeout if ended.done() else 0.0
            logger.info(
                "shutting down: %d unfinished, at most %g s more; a second signal ends it at once",
                engine.num_unfinished,
                patience_s,
            )
        finally:
            await engine.stop(patience_s)
        return Ended(ended.result() if ended.done() else None, hangs=engine.iteration_s > 0.0)
    finally:
        await listener.close()
        await runner.cleanup()


async def _ended_or_given_up(
    engine: EngineFace, config: ServerConfig, ended: asyncio.Future[int]
) -> None:
    watchdog = asyncio.create_task(
        until_given_up(engine, config.watchdog_s, config.watchdog_exit_s)
    )
    try:
        either: set[asyncio.Future[Any]] = {ended, watchdog}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watchdog.cancel()


def ready_message(url: str, model: str, *, chat: bool, needs_key: bool) -> str:
    """Return the console's text once requests are served: the URL, and a command to try."""
    command = example_command(url, model, chat=chat, needs_key=needs_key)
    return f"minserve serves {model} on {url}\nTry: {command}"


def reachable_url(sock: socket.socket) -> str:
    """Return the URL under which this machine reaches a listening socket."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _first_signal() -> asyncio.Future[int]:
    """Return a future of the first signal; a second signal then has its default action again."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def on_signal(number: int) -> None:
        for one in SIGNALS:
            loop.remove_signal_handler(one)
            signal.signal(one, signal.SIG_DFL)
        if not ended.done():  # two signals may come before the loop looks
            ended.set_result(number)

    for one in SIGNALS:
        loop.add_signal_handler(one, on_signal, int(one))
    return ended


async def _unless(ended: asyncio.Future[int], work: asyncio.Future[T]) -> T:
    """Wait for some work and return its result.

    Raises:
        LoadInterrupted: if a signal comes first.
    """
    either: set[asyncio.Future[T] | asyncio.Future[int]] = {work, ended}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        raise LoadInterrupted(ended.result())
    return work.result()


def _in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run a blocking function in a daemon thread, so that a signal need not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(report: Callable[[], None]) -> None:
        if not future.cancelled():
            report()

    def run() -> None:
        try:
            report = partial(future.set_result, function())
        except BaseException as error:
            report = partial(future.set_exception, error)
        loop.call_soon_threadsafe(settle, report)

    threading.Thread(target=run, name="load-model", daemon=True).start()
    return future
