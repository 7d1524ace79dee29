"""A real server over a real socket, in a thread of this process, on a tiny random model."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
from waiting import PATIENCE_S, wait_until

from minserve import AsyncEngine
from minserve.outputs import OutputDelta
from minserve.server.app import Server
from minserve.server.connections import ConnectionRunner
from minserve.server.lifecycle import bind_socket
from minserve.server.listener import Listener
from minserve.server_config import ServerConfig

ENGINE_SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "num_blocks": 256,
    "block_size": 16,
    "max_num_seqs": 32,
    "max_queue": 64,
}


@dataclass
class RunningServer:
    """A server in a thread of its own, with its engine in reach of the test."""

    engine: AsyncEngine
    loop: asyncio.AbstractEventLoop
    port: int
    runner: ConnectionRunner

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options}
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def wait_until_free(self) -> None:
        """Wait until nothing is waiting or running any more."""
        wait_until(lambda: not self.engine.num_unfinished, "some are still unfinished")

    def wait_until_busy(self) -> None:
        """Wait until something runs; the engine has to hang by then, or it may be over."""
        wait_until(lambda: self.engine.num_unfinished, "nothing runs")

    def wait_until_left(self) -> None:
        """Wait until the engine, which hangs now or soon, is told that a client has left."""

        def is_told() -> bool:
            told = list(self.engine._inbox)
            return not self.engine.num_unfinished or any(verb == "abort" for verb, _ in told)

        wait_until(is_told, "nobody leaves")

    def pass_time(self, seconds: float) -> None:
        """Let so many seconds go by on the clock of the server's loop.

        What clients have sent before is read before, and whatever is due by then has come after.
        """

        async def go_by() -> None:
            await turns()
            now = self.loop.time
            self.loop.time = lambda: now() + seconds  # type: ignore[method-assign]
            await turns()

        async def turns() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(go_by(), self.loop).result(PATIENCE_S)


def run_server(engine: AsyncEngine, config: ServerConfig) -> Iterator[RunningServer]:
    """Serve on a free port until the generator is closed."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    sock = bind_socket("127.0.0.1", 0)

    async def start() -> tuple[ConnectionRunner, Listener]:
        runner = Server(config, engine).create_runner()
        await engine.start()
        await runner.setup()
        return runner, Listener(sock, runner.connections, config.max_connections)

    async def stop(runner: ConnectionRunner, listener: Listener) -> None:
        await engine.stop()
        await listener.close()
        await runner.cleanup()

    parts = asyncio.run_coroutine_threadsafe(start(), loop).result(PATIENCE_S)
    try:
        yield RunningServer(engine, loop, sock.getsockname()[1], parts[0])
    finally:
        asyncio.run_coroutine_threadsafe(stop(*parts), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


def post(
    server: RunningServer,
    path: str,
    body: Any,
    headers: dict[str, str] | None = None,
    method: str = "POST",
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own; ``body`` is bytes or becomes JSON.

    A body is sent as JSON unless ``headers`` say otherwise.
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        kind = {} if data is None else {"Content-Type": "application/json"}
        connection.request(method, path, data, {**kind, **(headers or {})})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def tokenized(server: RunningServer, **body: Any) -> dict[str, Any]:
    status, _, raw = post(server, "/tokenize", body)
    assert status == 200, raw
    return json.loads(raw)


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def raw_answer(server: RunningServer, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes on a connection of their own, and return the one answer that HTTP/1.1 needs."""
    with server.connect() as sock:
        sock.sendall(sent)
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.version == 11
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()


def late_stream(
    server: RunningServer, path: str, body: dict[str, Any], seconds: float
) -> tuple[int, bytes]:
    """Status and body of a stream that hangs after a few tokens until so many seconds are over."""
    with hanging(server, after=5), server.connect() as sock:
        sock.sendall(request_bytes(path, {**body, "stream": True}))
        response = http.client.HTTPResponse(sock)
        response.begin()  # the first token is there
        server.pass_time(seconds)
        return response.status, response.read()


@contextmanager
def hanging(server: RunningServer, after: int = 0) -> Iterator[threading.Event]:
    """Let the engine hang after so many more iterations, until the event is set or the block ends."""
    core, go_on = server.engine._core, threading.Event()
    step, left = core.step, after

    def hanging_step() -> list[OutputDelta]:
        nonlocal left
        left -= 1
        if left < 0:
            go_on.wait(PATIENCE_S)
        return step()

    core.step = hanging_step  # type: ignore[method-assign]
    try:
        yield go_on
    finally:
        go_on.set()
        core.step = step  # type: ignore[method-assign]
