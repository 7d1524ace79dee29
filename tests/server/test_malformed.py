"""What the parser of HTTP refuses: answered as JSON, without the sender's bytes, in a line of log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket

import pytest
from live_server import RunningServer, post, raw_answer
from waiting import wait_until

from minserve.server.throttled_log import MOST_LINES, ThrottledLog

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MARK = b"ZZmarkZZ"

CASES: dict[str, tuple[int, bytes]] = {
    "a negative length": (400, POST + b"Content-Length: -5\r\nX: " + MARK + b"\r\n\r\n{}"),
    "a length in words": (400, POST + b"Content-Length: ZZmarkZZ\r\n\r\n{}"),
    "an empty length": (400, POST + b"Content-Length: \r\n\r\n{}"),
    "two lengths": (400, POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "a length beyond all numbers": (413, POST + b"Content-Length: 99999999999999999999\r\n\r\n"),
    "a length beyond the limit": (413, POST + b"Content-Length: 9999999\r\n\r\n"),
    "length and chunks": (
        400,
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    ),
    "chunks and length": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    ),
    "another transfer encoding": (400, POST + b"Transfer-Encoding: ZZmarkZZ\r\n\r\n{}"),
    "a chunk size in words": (400, POST + b"Transfer-Encoding: chunked\r\n\r\nZZmarkZZ\r\n"),
    "a negative chunk size": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n"),
    "a chunk size beyond all numbers": (
        413,
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n",
    ),
    "no length": (411, POST + b"\r\n"),
    "a long URI": (414, b"GET /" + MARK * 2000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "a long header": (
        431,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + MARK * 2000 + b"\r\n\r\n",
    ),
    "many headers": (
        431,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: ZZmarkZZ\r\n" * 200 + b"\r\n",
    ),
    "no host": (400, b"GET /health HTTP/1.1\r\nX: ZZmarkZZ\r\n\r\n"),
    "two hosts": (400, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: ZZmarkZZ\r\n\r\n"),
    "half an address": (400, b"GET /health HTTP/1.1\r\nHost: [::\r\n\r\n"),
    "an unknown expectation": (
        417,
        POST + b"Content-Length: 2\r\nExpect: ZZmarkZZ\r\n\r\n{}",
    ),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + MARK * 20),
    "an HTTP/2 preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\4\0\0\0\0\0" + MARK),
    "HTTP/2 in words": (505, b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n"),
    "HTTP/3.7": (505, b"GET /health HTTP/3.7\r\nHost: localhost\r\n\r\n"),
    "no version": (505, b"GET /health\r\n\r\n"),
    "bytes behind the end": (
        400,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\nZZmarkZZ",
    ),
    "words": (400, b"ZZmarkZZ what is this?\r\n\r\n"),
    "zeros": (400, b"\0" * 100),
    "a method in lower case": (400, b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "no path": (400, b"GET ZZmarkZZ HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "half an address as URI": (
        400,
        b"GET http://[::ZZmarkZZ/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ),
    "a port beyond all ports": (
        400,
        b"GET http://localhost:99999999/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ),
    "a header with a space": (400, b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n"),
    "a header with a zero": (
        400,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ZZmarkZZ\0\r\n\r\n",
    ),
    "a folded header": (400, b"GET /health HTTP/1.1\r\n ZZmarkZZ: x\r\n\r\n"),
    "a bare line feed": (400, b"GET /health HTTP/1.1\nHost: localhost\n\n"),
    "a tunnel": (404, b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
}

# The parser takes these, so that the connection goes on.
WELL_FORMED = ("a length beyond the limit", "no length", "half an address", "a tunnel")


@pytest.mark.parametrize("case", CASES)
def test_broken_http_gets_a_json_error_and_one_line_of_log(
    server: RunningServer, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, sent = CASES[case]
    server.runner.connections.log = ThrottledLog(logging.getLogger("minserve"))
    status, headers, body = raw_answer(server, sent)
    assert status == expected, body
    assert headers["content-type"].startswith("application/json")
    assert (headers.get("connection") == "close") == (case not in WELL_FORMED)
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "ZZ" not in body.decode()
    assert "ZZ" not in caplog.text
    assert "Traceback" not in caplog.text
    assert len(caplog.records) <= 1
    assert post(server, "/health", None, method="GET")[0] == 200


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"5\r\nhello5\r\n"])
def test_a_body_that_turns_out_to_be_malformed_is_answered_at_once(
    server: RunningServer, chunk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        wait_until(lambda: not server.runner.connections.num_idle, "the handler does not run")
        sock.sendall(chunk)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"chunks are malformed" in answer
    assert answer.count(b"HTTP/1.1") == 1
    assert "Traceback" not in caplog.text


def test_garbage_behind_a_request_does_not_disturb_its_answer(server: RunningServer) -> None:
    """The answer is whole, and the connection ends behind it."""
    body = b'{"prompt": "The rain", "max_tokens": 20, "stream": true, "ignore_eos": true}'
    with server.connect() as sock:
        sock.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        received = sock.recv(100)
        sock.sendall(b"\x16\x03 what is this?\r\n\r\n")
        received += b"".join(iter(lambda: sock.recv(65536), b""))
    first, _, rest = received.partition(b"data: [DONE]")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"this is not HTTP" not in first
    assert rest.startswith(b"\n\n\r\n0\r\n\r\n")


def test_a_flood_of_garbage_fills_no_log(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.runner.connections.log = ThrottledLog(logging.getLogger("minserve"))
    for _ in range(3 * MOST_LINES):
        raw_answer(server, b"garbage\r\n\r\n")
    assert len(caplog.records) == MOST_LINES


def test_the_lines_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]

    async def warn() -> None:
        log = ThrottledLog(
            logging.getLogger("minserve"), most=2, window_s=60.0, clock=lambda: now[0]
        )
        for number in range(5):
            log.warning("line %d", number)
        now[0] += 60.0
        log.warning("line 5")
        log.tell()

    asyncio.run(warn())
    told = [record.getMessage() for record in caplog.records]
    assert told == ["line 0", "line 1", "3 more lines like these were left out", "line 5"]


def test_a_request_on_a_half_closed_connection_frees_what_it_took(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1000) == b""
