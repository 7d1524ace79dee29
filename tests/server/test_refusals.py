"""What is refused: every malformed or forbidden request gets a 4xx in OpenAI's error form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import RunningServer, post

from minserve.server_config import ServerConfig

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "The quick brown fox jumps over"}]


def error_of(raw: bytes) -> dict[str, Any]:
    error = json.loads(raw)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def completion_with(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, **fields}


MALFORMED: list[tuple[str, Any]] = [
    ("/v1/completions", b""),
    ("/v1/completions", b"[1, 2]"),
    ("/v1/completions", b'"text"'),
    ("/v1/completions", b'{"prompt": "a", "prompt": "b"}'),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}'),
    ("/v1/completions", b'{"prompt": "a", "temperature": 1e999}'),
    ("/v1/completions", rb'{"prompt": "\ud800"}'),
    ("/v1/completions", b'{"prompt": "\xff"}'),
    ("/v1/completions", b'{"prompt":' * 50_000),
    ("/v1/completions", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("/v1/completions", {"model": "tiny"}),
    ("/v1/completions", completion_with(prompt="")),
    ("/v1/completions", completion_with(prompt=[])),
    ("/v1/completions", completion_with(prompt=[""])),
    ("/v1/completions", completion_with(prompt=[[]])),
    ("/v1/completions", completion_with(prompt=[512])),
    ("/v1/completions", completion_with(prompt=[2**40])),
    ("/v1/completions", completion_with(prompt=[-1])),
    ("/v1/completions", completion_with(prompt="word " * 2000)),
    ("/v1/completions", completion_with(prompt=[5] * 600)),
    ("/v1/completions", completion_with(n=10**6)),
    ("/v1/completions", completion_with(n=128)),
    ("/v1/completions", completion_with(prompt=[PROMPT] * 100)),
    ("/v1/completions", completion_with(max_tokens=10**9)),
    ("/v1/completions", completion_with(max_tokens=512)),
    ("/v1/completions", completion_with(max_tokens=0)),
    ("/v1/completions", completion_with(max_tokens=1.5)),
    ("/v1/completions", completion_with(max_tokens=True)),
    ("/v1/completions", completion_with(min_tokens=17)),
    ("/v1/completions", completion_with(temperature=1e308)),
    ("/v1/completions", completion_with(temperature=-1)),
    ("/v1/completions", completion_with(top_k=10**18)),
    ("/v1/completions", completion_with(stop_token_ids=[512])),
    ("/v1/completions", completion_with(stop_token_ids=[2**63])),
    ("/v1/completions", completion_with(seed=2**64)),
    ("/v1/completions", completion_with(slo="no such class")),
    ("/v1/completions", completion_with(slo=["coding"])),
    ("/v1/completions", completion_with(slo={"x" * 2000: 1})),
    ("/v1/completions", completion_with(model="x" * 2000)),
    ("/v1/completions", completion_with(stream_options={"x" * 2000: 1})),
    ("/v1/completions", completion_with(slo={})),
    ("/v1/completions", completion_with(slo={"ttft_ms": 0})),
    ("/v1/completions", completion_with(slo={"ttft_ms": -1})),
    ("/v1/completions", completion_with(slo={"ttft_ms": 1e308})),
    ("/v1/completions", completion_with(slo={"tpot_ms": True})),
    ("/v1/completions", completion_with(slo={"tpot_ms": "50"})),
    ("/v1/completions", completion_with(slo={"tpot_slowdown": 0.5})),
    ("/v1/completions", b'{"prompt": "a", "slo": {"ttft_ms": NaN}}'),
    ("/v1/completions", b'{"prompt": "a", "slo": {"ttft_ms": 1' + b"0" * 400 + b"}}"),
    ("/v1/completions", completion_with(slo={"class": "coding", "x" * 10_000: 1})),
    ("/v1/chat/completions", {"messages": MESSAGES, "slo": {"ttft_ms": 1, "ttft_slowdown": 2}}),
    ("/v1/completions", completion_with(model="other")),
    ("/v1/completions", completion_with(**{"x" * 10_000: 1})),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": "hello"}),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    ("/v1/chat/completions", {"messages": MESSAGES, "min_tokens": 10**15}),
    ("/v1/chat/completions", {"messages": MESSAGES, "include_acceptance": "yes"}),
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}),
    ("/tokenize", {}),
    ("/tokenize", {"prompt": 5}),
    ("/detokenize", {"tokens": [512]}),
    ("/detokenize", {"tokens": [10**30]}),
    ("/detokenize", {"tokens": "abc"}),
]


@pytest.mark.parametrize(("path", "body"), MALFORMED)
def test_a_malformed_request_gets_4xx_and_the_next_is_served(
    server: RunningServer, path: str, body: Any
) -> None:
    status, headers, raw = post(server, path, body)
    assert 400 <= status < 500, raw
    assert headers["Content-Type"].startswith("application/json")
    assert len(error_of(raw)["message"]) <= 1000
    status, _, raw = post(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 10})
    assert status == 200
    assert json.loads(raw)["choices"][0]["finish_reason"]


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt=PROMPT, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
    assert long.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="at most 64 can be queued"):
        client.completions.create(model="tiny", prompt=[PROMPT] * 65)


@pytest.mark.parametrize(
    ("fields", "requested"),
    [
        ({"prompt": [5] * 20, "max_tokens": 1000}, "you requested 1020 tokens (20 in the messages"),
        ({"prompt": [5] * 600}, "your prompt resulted in 600 tokens"),
        ({"prompt": "word " * 20_000}, "your prompt resulted in "),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "your messages resulted in "),
    ],
)
def test_clients_know_an_overflow_by_its_words(
    server: RunningServer, fields: dict[str, Any], requested: str
) -> None:
    """They are those for which litellm, LangChain and others look, in the message or anywhere."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    status, _, raw = post(server, path, fields)
    error = error_of(raw)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    start = "This model's maximum context length is 512 tokens. However, "
    assert error["message"].startswith(start + requested)
    assert "context_length_exceeded" in error["message"]
    # Words by which litellm knows another error, for which it looks first.
    assert not re.search(r"rate[\s_\-]*limit", error["message"].lower())


def test_a_full_queue_is_a_rate_limit_and_room_comes_back(
    server: RunningServer, client: openai.OpenAI
) -> None:
    full_house = client.completions.create(
        model="tiny",
        prompt=[PROMPT] * 64,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(full_house))
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
    assert full.value.response.headers["retry-after"] == "1"
    full_house.close()
    server.wait_until_free()
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices


def test_a_refused_stream_has_a_status_and_no_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10**6, stream=True)


def test_paths_and_methods(server: RunningServer) -> None:
    for method, path, expected in (
        ("GET", "/nowhere", 404),
        ("POST", "/v1/nowhere", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/health", 405),
    ):
        status, headers, raw = post(server, path, None, method=method)
        assert status == expected, path
        assert error_of(raw)["type"] == "invalid_request_error"
        assert ("Allow" in headers) == (expected == 405)


def test_large_and_compressed_bodies(server: RunningServer) -> None:
    status, _, raw = post(server, "/v1/completions", completion_with(prompt="x" * 2**21))
    assert status == 413
    error_of(raw)
    status, _, raw = post(
        server, "/v1/completions", b"\x1f\x8b" + b"0" * 100, {"Content-Encoding": "gzip"}
    )
    assert status == 415
    error_of(raw)
    status, _, raw = post(server, "/v1/completions", b"{}", {"Content-Encoding": b"\xff"})
    assert status == 415
    assert "compressed (?)" in error_of(raw)["message"]


def test_a_chunked_body_over_the_limit(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        for _ in range(17):
            sock.sendall(chunk)
        assert sock.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_model_without_chat_template_refuses_chat(
    tiny_opt_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_opt_dir, ServerConfig())
    status, _, raw = post(server, "/v1/chat/completions", {"messages": MESSAGES})
    assert status == 400
    assert "chat template" in error_of(raw)["message"]
    assert post(server, "/tokenize", {"messages": MESSAGES})[0] == 400
    assert post(server, "/v1/completions", {"prompt": PROMPT})[0] == 200
