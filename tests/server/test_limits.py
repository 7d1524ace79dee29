"""Limits: requests in flight for each client, and the time for a body and for a generation."""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_server import RunningServer, hanging, late_stream, post, request_bytes
from waiting import wait_until

from minserve.errors import ConfigError
from minserve.server_config import ServerConfig

Start = Callable[..., RunningServer]
LONG = {"prompt": "The rain", "max_tokens": 400, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "The rain", "max_tokens": 1}
PATH = "/v1/completions"


def with_key(key: str, body: dict[str, Any]) -> bytes:
    raw = request_bytes(PATH, body)
    return raw.replace(b"\r\n", f"\r\nAuthorization: Bearer {key}\r\n".encode(), 1)


def status_of(sock: socket.socket) -> int:
    response = http.client.HTTPResponse(sock)
    response.begin()
    return response.status


def error_of(raw: bytes) -> dict[str, Any]:
    return json.loads(raw)["error"]


def test_a_key_has_so_many_requests_in_flight_and_no_more(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    config = ServerConfig(api_key=("one", "two"), max_requests_per_key=2)
    server = start_server(tiny_llama_dir, config)
    socks = [server.connect() for _ in range(8)]
    with hanging(server):
        for sock in socks:  # all at once
            sock.sendall(with_key("one", LONG))
        refused = wait_until(
            lambda: len(found := select.select(socks, [], [], 0)[0]) >= 6 and found
        )
        assert list(map(status_of, refused)) == [429] * 6
        assert server.engine.num_unfinished == 2
        status, headers, raw = post(server, PATH, SHORT, {"Authorization": "Bearer one"})
        assert (status, headers["Retry-After"]) == (429, "1")
        assert error_of(raw)["code"] == "too_many_requests"
        assert "API key" in error_of(raw)["message"]
        # Neither what is no generation nor another key is affected.
        key = {"Authorization": "Bearer one"}
        assert post(server, "/v1/models", None, key, method="GET")[0] == 200
        other = server.connect()
        other.sendall(with_key("two", LONG))
        wait_until(lambda: server.engine.num_unfinished == 3)
    served = [sock for sock in socks if sock not in refused]
    assert list(map(status_of, [*served, other])) == [200] * 3
    for sock in [*socks, other]:
        sock.close()
    server.wait_until_free()
    wait_until(lambda: post(server, PATH, SHORT, key)[0] == 200, "the places do not come back")


def test_without_keys_the_limit_is_that_of_an_address(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(max_requests_per_key=1))
    with hanging(server, after=5), server.connect() as sock:
        sock.sendall(request_bytes(PATH, LONG))
        assert status_of(sock) == 200
        status, _, raw = post(server, PATH, SHORT)
        assert status == 429
        assert "address" in error_of(raw)["message"]


def test_a_failed_request_gives_its_place_back(tiny_llama_dir: Path, start_server: Start) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(max_requests_per_key=1))
    for _ in range(3):
        assert post(server, PATH, b"no json")[0] == 400
    assert post(server, PATH, SHORT)[0] == 200


@pytest.mark.parametrize("length", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_takes_too_long_ends_with_408(
    tiny_llama_dir: Path, start_server: Start, length: str
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(body_timeout_s=0.2))
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}"
    with server.connect() as sock:
        sock.sendall(f"{head}\r\n\r\n".encode())
        sock.settimeout(0.02)
        answer = b""
        while b"}}" not in answer:
            try:
                sock.sendall(b"1\r\n \r\n" if "chunked" in length else b" ")
                answer += sock.recv(65536)
            except TimeoutError:
                pass
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in answer
    assert b'"type":"invalid_request_error"' in answer
    assert post(server, PATH, SHORT)[0] == 200


def test_a_body_in_time_is_not_cut_off_while_its_answer_takes_longer(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(body_timeout_s=30.0))
    with hanging(server) as go_on, server.connect() as sock:
        sock.sendall(request_bytes(PATH, SHORT))
        server.wait_until_busy()
        server.pass_time(31.0)
        go_on.set()
        assert status_of(sock) == 200


def test_a_generation_that_takes_too_long_ends_with_504(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(request_timeout_s=0.2))
    with hanging(server):
        for stream in (False, True):  # no token has come, so that a stream has a status too
            status, headers, raw = post(server, PATH, {**LONG, "stream": stream})
            assert status == 504
            assert error_of(raw)["code"] == "request_timeout"
            assert headers["x-should-retry"] == "false"
    server.wait_until_free()


def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(request_timeout_s=60.0, first_byte_s=0.0))
    status, raw = late_stream(server, PATH, {**LONG, "max_tokens": 8}, 61.0)
    assert status == 200
    *chunks, last = [json.loads(part[6:]) for part in raw.decode().strip().split("\n\n")]
    assert chunks
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["error"]["code"] == "request_timeout"
    server.wait_until_free()


@pytest.mark.parametrize(
    "setting",
    [{"request_timeout_s": 0.0}, {"body_timeout_s": float("nan")}, {"header_timeout_s": -1.0},
     {"send_timeout_s": float("inf")}, {"keep_alive_s": 0.0}, {"max_connections": 0},
     {"max_requests_per_key": 0}],
)  # fmt: skip
def test_limits_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ServerConfig(**setting)
