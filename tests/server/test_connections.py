"""Connections: clients that are slow or silent, and more of them than the process can hold."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from live_server import RunningServer, hanging, post, request_bytes
from waiting import PATIENCE_S, wait_until

from minserve.server_config import ServerConfig

Start = Callable[..., RunningServer]
LONG = {"prompt": "The rain", "max_tokens": 400, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "The rain", "max_tokens": 1}
PATH = "/v1/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def until_closed(sock: socket.socket) -> bytes:
    """All bytes up to the end that the server sets."""
    received = b""
    try:
        while part := sock.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


# --- slow clients ---


def test_headers_that_take_too_long_end_with_408(tiny_llama_dir: Path, start_server: Start) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(header_timeout_s=30.0))
    for served_before in (False, True):
        wait_until(lambda: server.runner.connections.num_open == 0)
        with server.connect() as sock:
            wait_until(lambda: server.runner.connections.num_open == 1)
            if served_before:
                sock.sendall(HEALTH)
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            server.pass_time(31.0)
            answer = until_closed(sock)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"x-request-id: " in head
        assert "headers" in json.loads(body)["error"]["message"]


def test_headers_that_trickle_in_end_with_408(tiny_llama_dir: Path, start_server: Start) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(header_timeout_s=30.0))
    with server.connect() as sock:
        wait_until(lambda: server.runner.connections.num_open == 1)
        sock.sendall(b"GET /health HTTP/1.1\r\nX: ")
        for _ in range(4):
            assert select.select([sock], [], [], 0) == ([], [], [])
            sock.sendall(b"x")
            server.pass_time(8.0)
        assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_silent_connections_are_closed_without_a_word(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(header_timeout_s=30.0, keep_alive_s=30.0))
    with server.connect() as never_asked, server.connect() as asked:
        asked.sendall(HEALTH)
        assert asked.recv(65536).startswith(b"HTTP/1.1 200")
        wait_until(lambda: server.runner.connections.num_open == 2)
        server.pass_time(31.0)
        assert until_closed(never_asked) == until_closed(asked) == b""


def test_a_long_answer_is_no_silence(tiny_llama_dir: Path, start_server: Start) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(header_timeout_s=30.0, keep_alive_s=30.0))
    with hanging(server) as go_on, server.connect() as sock:
        sock.sendall(request_bytes(PATH, SHORT))
        server.wait_until_busy()
        server.pass_time(100.0)
        go_on.set()
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_nothing_loses_its_connection(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(send_timeout_s=0.3))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        wait_until(lambda: server.runner.connections.num_open == 1)
        sock.sendall(request_bytes(PATH, {**LONG, "n": 16, "logprobs": 50}))
        wait_until(lambda: server.runner.connections.num_open == 0, "it is still connected")
        server.wait_until_free()
    assert post(server, PATH, SHORT)[0] == 200


# --- many clients ---


def test_the_longest_idle_connection_gives_way_to_a_new_one(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(max_connections=3))
    idle = []
    for _ in range(3):  # one after the other
        idle.append(server.connect())
        wait_until(lambda: server.runner.connections.num_open == len(idle))
    assert post(server, PATH, SHORT)[0] == 200
    assert until_closed(idle[0]) == b""
    for sock in idle[1:]:
        sock.sendall(HEALTH)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.close()


def test_where_all_are_busy_a_new_connection_is_answered_with_503(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(max_connections=3))
    with hanging(server):
        busy = [server.connect() for _ in range(3)]
        for sock in busy:
            sock.sendall(request_bytes(PATH, SHORT))
        wait_until(lambda: server.engine.num_unfinished == 3)
        with server.connect() as sock:
            head, _, body = until_closed(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1" in head
        assert json.loads(body)["error"]["type"] == "service_unavailable_error"
    for sock in busy:
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.close()
    wait_until(lambda: server.runner.connections.num_open < 3)
    assert post(server, PATH, SHORT)[0] == 200


FEW_FILES = """
import asyncio, resource
from aiohttp import web
from minserve.server_config import ServerConfig
from minserve.server.connections import ConnectionRunner
from minserve.server.lifecycle import bind_socket
from minserve.server.listener import Listener, allow_connections

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, 64))
    most = allow_connections(4096)
    app = web.Application()

    async def health(request):
        return web.Response(text="fine")

    app.add_routes([web.get("/health", health)])
    runner = ConnectionRunner(app, ServerConfig(), 1.0)
    await runner.setup()
    sock = bind_socket("127.0.0.1", 0)
    # More than there are files, so that accepting fails.
    listener = Listener(sock, runner.connections, 10_000)
    print(sock.getsockname()[1], most, resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_more_connections_than_file_descriptors_are_survived_quietly(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", FEW_FILES], stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            port, most, files = map(int, process.stdout.readline().split())
            assert (most, files) == (16, 64)  # what the system allows, and what there is left of it
            socks = [
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
                for _ in range(200)
            ]
            # The last one is served although all the others are still open.
            socks[-1].sendall(HEALTH)
            assert socks[-1].recv(65536).startswith(b"HTTP/1.1 200")
            for sock in socks:
                sock.close()
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock:
                sock.sendall(HEALTH)
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        finally:
            process.kill()
    told = log.read_text()
    assert "Too many open files" in told
    assert "Traceback" not in told
    assert len(told.splitlines()) < 40


@pytest.mark.parametrize("given", ["mine-1", "x" * 128, "a b~!"])
def test_a_request_id_is_taken_and_returned(server: RunningServer, given: str) -> None:
    for path, method, body in (
        (PATH, "POST", SHORT),
        ("/health", "GET", None),
        ("/no", "GET", None),
    ):
        _, headers, _ = post(server, path, body, {"x-request-id": given}, method=method)
        assert headers["x-request-id"] == given
    _, headers, _ = post(server, PATH, {**LONG, "max_tokens": 2}, {"X-Request-ID": given})
    assert headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "naïve", "tab\there"])
def test_another_id_is_made_where_it_cannot_be_used(
    server: RunningServer, given: str | None
) -> None:
    sent = {} if given is None else {"x-request-id": given.encode()}
    made = set()
    for _ in range(2):
        _, headers, _ = post(server, PATH, b"no json", sent)  # type: ignore[arg-type]
        made.add(headers["x-request-id"])
    assert len(made) == 2
    assert all(len(one) == 32 for one in made)
