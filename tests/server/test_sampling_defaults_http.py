"""Over HTTP, a model's own sampling settings stand for those that a request leaves out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_server import RunningServer, post

from minserve.server.protocol import parse_chat, parse_completion
from minserve.server_config import ServerConfig

MESSAGES = [{"role": "user", "content": "The quick brown fox jumps over"}]
DEFAULTS = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1, "max_tokens": 8}


def test_what_a_body_says_counts_more() -> None:
    left_out = parse_completion({"prompt": "a"}, DEFAULTS).params
    assert (left_out.temperature, left_out.top_k, left_out.repetition_penalty) == (0.7, 5, 1.1)
    assert left_out.max_tokens == 16  # OpenAI's own default there, whatever the model's file says
    given = parse_completion({"prompt": "a", "temperature": 0, "top_k": 0}, DEFAULTS).params
    assert (given.temperature, given.top_k, given.repetition_penalty) == (0, 0, 1.1)
    chat = parse_chat({"messages": MESSAGES}, DEFAULTS).params
    assert (chat.temperature, chat.max_tokens) == (0.7, None)
    assert parse_chat({"messages": MESSAGES, "max_tokens": 3}, DEFAULTS).params.max_tokens == 3


@pytest.fixture
def greedy_server(
    tiny_llama_dir: Path, tmp_path: Path, start_server: Callable[..., RunningServer]
) -> RunningServer:
    """A server of a model that wants to be sampled greedily, and 8 tokens at most."""
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "tiny")
    values = {"temperature": 0.0, "max_new_tokens": 8}
    (folder / "generation_config.json").write_text(json.dumps(values))
    return start_server(folder, ServerConfig())


def ask(server: RunningServer, path: str, body: Any = None) -> Any:
    method = "GET" if body is None else "POST"
    status, _, answer = post(server, path, body, method=method)
    assert status == 200, answer
    return json.loads(answer)


def test_a_chat_gets_the_models_settings_and_tells_them(greedy_server: RunningServer) -> None:
    body = {"messages": MESSAGES, "ignore_eos": True}
    first, second = (ask(greedy_server, "/v1/chat/completions", body) for _ in range(2))
    explicit = {**body, "temperature": 0, "max_tokens": 8}
    assert first["choices"] == second["choices"]
    assert first["choices"] == ask(greedy_server, "/v1/chat/completions", explicit)["choices"]
    assert first["usage"]["completion_tokens"] == 8
    sampled = ask(greedy_server, "/v1/chat/completions", {**body, "temperature": 1, "seed": 3})
    assert sampled["choices"] != first["choices"]
    longer = ask(greedy_server, "/v1/chat/completions", {**body, "max_tokens": 20})
    assert longer["usage"]["completion_tokens"] == 20
    (card,) = ask(greedy_server, "/v1/models")["data"]
    assert card["default_sampling_params"] == {"temperature": 0.0, "max_tokens": 8}


def test_a_model_without_settings_says_so(
    tiny_opt_dir: Path, tmp_path: Path, start_server: Callable[..., RunningServer]
) -> None:
    folder = shutil.copytree(tiny_opt_dir, tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    server = start_server(folder, ServerConfig(), generation_config="off")
    (card,) = ask(server, "/v1/models")["data"]
    assert card["default_sampling_params"] == {}
