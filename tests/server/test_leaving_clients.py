"""Clients that leave or lag: their requests are freed, and nobody else notices."""

from __future__ import annotations

import socket
import struct

import pytest
from live_server import RunningServer, hanging, request_bytes

from minserve.request import FinishReason

PROMPT = "The quick brown fox"
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_request(
    server: RunningServer, stream: bool, reset: bool
) -> None:
    body = {**LONG, "stream": stream, "n": 8, "prompt": [PROMPT, "A server"]}
    with hanging(server, after=5):
        sock = server.connect()
        sock.sendall(request_bytes("/v1/completions", body))
        server.wait_until_busy()
        before = server.engine.stats().finished
        if stream:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        server.wait_until_left()
    server.wait_until_free()
    after = server.engine.stats().finished
    ended = {
        reason: after[reason] - before[reason] for reason in after if after[reason] > before[reason]
    }
    assert ended == {FinishReason.ABORT: 16}


def test_two_hundred_requests_opened_and_dropped(server: RunningServer) -> None:
    before = server.engine.stats().num_generation_tokens
    socks = [server.connect() for _ in range(200)]
    for sock in socks:
        sock.sendall(request_bytes("/v1/completions", LONG))
    for sock in socks:
        sock.close()
    # The queue may be full until the server has seen them all go: clients try again then.
    with server.client(max_retries=5) as client:
        assert client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    server.wait_until_free()
    made = server.engine.stats().num_generation_tokens - before
    assert made < 200 * LONG["max_tokens"] / 2


def test_a_slow_reader_blocks_nobody(server: RunningServer) -> None:
    slow = server.connect()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    body = {**LONG, "stream": True, "n": 8, "logprobs": 20}
    slow.sendall(request_bytes("/v1/completions", body))
    server.wait_until_busy()
    with server.client() as client:
        assert client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    slow.close()
    server.wait_until_free()
