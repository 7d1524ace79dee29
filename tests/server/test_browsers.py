"""Requests that a browser marks: which names, origins and types of bodies are served."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import ENGINE_SETTINGS, RunningServer, post, raw_answer, run_server

from minserve import AsyncEngine
from minserve.errors import ConfigError
from minserve.server_config import ServerConfig

BODY = {"prompt": "The rain", "max_tokens": 1}
PATH = "/v1/completions"
THEIRS, OURS = "http://evil.example", "http://127.0.0.1:{port}"
FRIEND = "https://chat.example.com"
PREFLIGHT = {"Access-Control-Request-Method": "POST"}

Start = Callable[..., RunningServer]


def code_of(raw: bytes) -> str | None:
    return json.loads(raw)["error"]["code"]


def ask(server: RunningServer, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named = {name: value.format(port=server.port) for name, value in named.items()}
    return post(server, PATH, BODY, named)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": THEIRS},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://127.0.0.1:{port}.evil.example"},
        {"Origin": "http://[::"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Origin": OURS},
        {"Sec_Fetch_Site": "something new"},
    ],
)
def test_a_page_of_another_origin_is_refused(
    server: RunningServer, headers: dict[str, str]
) -> None:
    status, answered, raw = ask(server, **headers)
    assert (status, code_of(raw)) == (403, "origin_not_allowed")
    assert "--allowed-origins" in str(raw)
    assert not any(name.startswith("Access-Control") for name in answered)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": OURS},
        {"Origin": OURS, "Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "none"},
        # Behind a proxy that gives the server another Host.
        {"Origin": FRIEND, "Sec_Fetch_Site": "same-origin"},
    ],
)
def test_own_pages_and_other_programs_are_served(
    server: RunningServer, headers: dict[str, str]
) -> None:
    assert ask(server, **headers)[0] == 200


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/replicas/0/drain", "/nowhere"])
def test_every_route_that_changes_or_computes_is_guarded(server: RunningServer, path: str) -> None:
    for body in (None, {"prompt": "a"}):
        status, _, raw = post(server, path, body, {"Origin": THEIRS})
        assert (status, code_of(raw)) == (403, "origin_not_allowed")


def test_a_link_from_elsewhere_may_be_followed(server: RunningServer) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert post(server, "/v1/models", None, followed, method="GET")[0] == 200


# --- types of bodies ---


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "text/json", ""]
)
def test_a_body_that_is_not_called_json_is_refused_with_what_to_send(
    server: RunningServer, content_type: str
) -> None:
    status, _, raw = ask(server, Content_Type=content_type)
    assert status == 415
    assert "-H 'Content-Type: application/json'" in json.loads(raw)["error"]["message"]


def test_a_body_without_a_type_is_refused(server: RunningServer) -> None:
    """A page may send one without asking first."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    assert raw_answer(server, head)[0] == 415


def test_json_with_a_charset_is_json(server: RunningServer) -> None:
    assert ask(server, Content_Type="Application/JSON; charset=utf-8")[0] == 200


# --- Host ---


def hosts_served(server: RunningServer, *hosts: str) -> list[str]:
    served = []
    for host in hosts:
        status, _, raw = post(server, "/v1/models", None, {"Host": host}, method="GET")
        assert status == 200 or (status, code_of(raw)) == (403, "unknown_host")
        if status == 200:
            served.append(host)
    return served


def test_only_names_that_the_server_knows_are_served(server: RunningServer) -> None:
    known = ["localhost", "LOCALHOST.:8000", "app.localhost", "127.0.0.1:1", "[::1]:8000"]
    known += ["10.1.2.3", socket.gethostname()]
    lies = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.1", "x"]
    assert hosts_served(server, *known, *lies) == known
    head = b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw_answer(server, head)[0] == 403


def test_names_can_be_allowed(tiny_llama_dir: Path, start_server: Start) -> None:
    names = ("llm.example.com,second.example.com", "Third.example.com")
    server = start_server(tiny_llama_dir, ServerConfig(allowed_hosts=names))
    known = ["llm.example.com:8000", "SECOND.example.com", "third.example.com", "localhost"]
    assert hosts_served(server, *known, "example.com") == known
    server = start_server(tiny_llama_dir, ServerConfig(allowed_hosts=("*",)))
    assert hosts_served(server, "evil.example") == ["evil.example"]


# --- CORS ---


@pytest.fixture(scope="module")
def open_server(tiny_llama_dir: Path) -> Iterator[RunningServer]:
    config = ServerConfig(api_key=("secret",), allowed_origins=(FRIEND,))
    yield from run_server(AsyncEngine(str(tiny_llama_dir), **ENGINE_SETTINGS), config)


def test_a_preflight_is_answered_without_the_key(open_server: RunningServer) -> None:
    asked = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
    status, headers, raw = post(
        open_server, PATH, None, {"Origin": FRIEND, **PREFLIGHT, **asked}, method="OPTIONS"
    )
    assert (status, raw) == (204, b"")
    assert headers["Access-Control-Allow-Origin"] == FRIEND
    assert headers["Access-Control-Allow-Methods"] == "POST"
    assert headers["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
    assert "Origin" in headers["Vary"]


def test_a_preflight_of_another_page_is_refused(open_server: RunningServer) -> None:
    status, headers, _ = post(
        open_server, PATH, None, {"Origin": THEIRS, **PREFLIGHT}, method="OPTIONS"
    )
    assert status == 403
    assert "Access-Control-Allow-Origin" not in headers


def test_an_allowed_page_reads_answers_and_errors(open_server: RunningServer) -> None:
    key = {"Authorization": "Bearer secret"}
    for expected, more in ((200, key), (401, {}), (415, {**key, "Content-Type": "text/plain"})):
        headers = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site", **more}
        status, answered, _ = post(open_server, PATH, BODY, headers)
        assert status == expected
        assert answered["Access-Control-Allow-Origin"] == FRIEND
        assert "x-request-id" in answered["Access-Control-Expose-Headers"]
    # A cache must not give one page's answer to another.
    assert "Origin" in post(open_server, PATH, BODY, key)[1]["Vary"]


def test_every_origin_can_be_allowed_but_not_to_give_orders(
    tiny_llama_dir: Path, start_server: Start
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(allowed_origins=("*",)))
    for origin in (THEIRS, "null"):
        status, headers, _ = ask(server, Origin=origin, Sec_Fetch_Site="cross-site")
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, "*")
        status, _, raw = post(server, "/replicas/0/drain", None, {"Origin": origin})
        assert (status, code_of(raw)) == (403, "origin_not_allowed")
        assert "--api-key" in str(raw)


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_origins": ("chat.example.com",)},
        {"allowed_origins": ("https://chat.example.com/app",)},
        {"allowed_origins": "*"},
        {"allowed_hosts": ("llm.example.com:8000",)},
        {"allowed_hosts": ("http://llm.example.com",)},
    ],
)
def test_settings_that_would_never_match_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed_"):
        ServerConfig(**settings)
