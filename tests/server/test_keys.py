"""API keys: which are right, where they come from, and which routes need one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import ENGINE_SETTINGS, RunningServer, post, raw_answer, run_server

from minserve import AsyncEngine
from minserve.cli.main import main
from minserve.errors import ConfigError
from minserve.server.keys import read_keys
from minserve.server_config import ServerConfig


@pytest.fixture(scope="module")
def guarded(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with the keys ``sécret``, ``second`` and, from a file, ``third``."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("# of the team\n\n  third  \n")
    config = ServerConfig(api_key=("sécret", "second"), api_keys_file=str(file))
    yield from run_server(AsyncEngine(str(tiny_llama_dir), **ENGINE_SETTINGS), config)


def status_with(server: RunningServer, authorization: str | None, path: str = "/v1/models") -> int:
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    status, answered, raw = post(server, path, None, headers, method="GET")  # type: ignore[arg-type]
    if status == 401:
        assert json.loads(raw)["error"]["code"] == "invalid_api_key"
        assert answered["WWW-Authenticate"] == "Bearer"
    return status


@pytest.mark.parametrize(
    "authorization",
    ["Bearer sécret", "bearer second", "BEARER third", "Bearer  second", "bEaReR second "],
)
def test_every_key_is_right_and_the_scheme_is_written_as_one_likes(
    guarded: RunningServer, authorization: str
) -> None:
    assert status_with(guarded, authorization) == 200


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "second", "Basic second", "Bearer secon", "Bearer second2",
     "Bearer sécret second", "Bearer SECOND", "Bearer # of the team", "Bearer \ud800"],
)  # fmt: skip
def test_everything_else_is_wrong(guarded: RunningServer, authorization: str | None) -> None:
    sent = authorization and authorization.replace("\ud800", "�")
    assert status_with(guarded, sent) == 401


def test_a_key_in_bytes_that_are_no_text_is_wrong(guarded: RunningServer) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"
    assert raw_answer(guarded, head)[0] == 401


@pytest.mark.parametrize(
    "target",
    ["/v1/models", "//v1/models", "//metrics", "/health/", "/metrics/", "/HEALTH", "/health/x",
     "/health/../v1/models", "/health/%2e%2e/v1/models", "/metrics/..%2fv1/models", "/v1/./models",
     "/v1/models?/health", "/v1/models;/health", "/%76%31/models", "http://localhost/v1/models",
     "http://localhost//health", "/nowhere", "/health%00", "/health%2f"],
)  # fmt: skip
def test_no_way_of_writing_a_path_goes_around_the_key(guarded: RunningServer, target: str) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw_answer(guarded, head.encode())[0] == 401


@pytest.mark.parametrize(
    "target", ["/health", "/metrics", "/health?a=b", "/%68ealth", "http://localhost/health"]
)
def test_the_routes_of_monitoring_need_no_key(guarded: RunningServer, target: str) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw_answer(guarded, head.encode())[0] == 200


def test_without_a_key_no_body_is_read(guarded: RunningServer) -> None:
    """The answer comes although the body does not."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    assert raw_answer(guarded, head + b"Content-Type: application/json\r\n\r\n{")[0] == 401


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no API key"),
        (b"# nothing\n\n", "no API key"),
        (b"good\ntwo words\n", "line 2"),
        (b"\xff\xfe", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_explained(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as refused:
        read_keys(str(file))
    assert str(file) in str(refused.value)
    assert "two words" not in str(refused.value)


def test_serve_refuses_a_missing_file_before_it_loads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "keys")
    assert main(["serve", "--port", "0", "--api-keys-file", missing]) == 1
    assert f"minserve: error: cannot read the API keys of {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "two words", "new\nline"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(api_key=("good", key))
    assert not key or key not in str(refused.value)


def test_one_text_in_place_of_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="tuple"):
        ServerConfig(api_key="secret")  # type: ignore[arg-type]
