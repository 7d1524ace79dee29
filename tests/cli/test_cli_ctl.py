"""``minserve ctl`` against a real server, and against what is none."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from served import served
from unused_ports import unused_port
from waiting import PATIENCE_S

from minserve.cli.main import main
from minserve.config import EngineConfig
from minserve.controller.controller import Controller
from minserve.controller.rendezvous import Rendezvous
from minserve.controller.replicas import ReplicaState
from minserve.process_config import ControllerConfig
from minserve.server.app import Server
from minserve.server_config import ServerConfig

COLUMNS = ["replica", "state", "for_s", "pid", "host", "requests", "routed", "lost"]


@pytest.fixture
def controller(tiny_llama_dir: Path) -> Controller:
    """Of three replicas: the second is up, the others have yet to come."""
    found = Controller(
        EngineConfig(model=str(tiny_llama_dir)),
        ControllerConfig(replicas=3),
        Rendezvous("127.0.0.1", 0, 3),
    )
    found.table.replicas[1].enter(ReplicaState.UP)
    found.table.replicas[2].num_lost = 1234567
    return found


@pytest.fixture
def url(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("MINSERVE_API_KEY", raising=False)
    with served(Server(ServerConfig(), controller).create_runner()) as url:
        yield url


@contextmanager
def guarded(controller: Controller, key: str) -> Iterator[str]:
    """The URL of a server that asks for a key."""
    with served(Server(ServerConfig(api_key=(key,)), controller).create_runner()) as url:
        yield url


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The only line that a failing command says."""
    assert main(["ctl", *args]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("minserve: error: ")
    return line


def table(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, str]]:
    """The table that a command prints, row by row."""
    assert main(["ctl", *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    head, *rows = [line.split() for line in captured.out.splitlines()]
    assert head == COLUMNS
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_status_is_a_table_with_all_columns(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "status", "--url", url)
    assert [row["replica"] for row in rows] == ["0", "1", "2"]
    assert [row["state"] for row in rows] == ["starting", "up", "starting"]
    assert [row["lost"] for row in rows] == ["0", "0", "1234567"]
    # Nobody knows these of one that is not there.
    assert (rows[0]["pid"], rows[0]["host"]) == ("-", "-")
    assert all(re.fullmatch(r"\d+\.\d", row["for_s"]) for row in rows)


def test_columns_stand_below_each_other(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", "status", "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    for column in COLUMNS:
        at = re.search(rf"\b{column}\b", lines[0]).start()
        for line in lines[1:]:
            assert line[at] != " "
            assert at == 0 or line[at - 1] == " "


def test_a_url_may_end_with_a_slash(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(table(capsys, "status", "--url", f"{url}/")) == 3


def test_json_is_one_object_as_the_server_gives_it(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ctl", "status", "--json", "--url", url]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)["replicas"]
    assert [list(one) for one in told] == [COLUMNS] * 3
    assert [one["lost"] for one in told] == [0, 0, 1234567]
    assert told[0]["pid"] is None


def test_drain_and_resume_change_one_replica_and_show_all(
    url: str, controller: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    states = [row["state"] for row in table(capsys, "drain", "1", "--url", url)]
    assert states == ["starting", "drained", "starting"]
    assert controller.table.replicas[1].state is ReplicaState.DRAINED
    states = [row["state"] for row in table(capsys, "resume", "1", "--url", url)]
    assert states == ["starting", "up", "starting"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["dance"],
        ["status", "1"],
        ["drain"],
        ["resume"],
        ["restart"],
        ["drain", "first"],
        ["drain", "1", "2"],
        ["status", "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ctl", *args])
    assert ended.value.code == 2
    assert "usage: minserve" in capsys.readouterr().err


def test_a_dead_url_is_one_line_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    line = error_of(capsys, "status", "--url", url)
    assert url in line
    assert "no minserve answers" in line


@pytest.mark.parametrize(
    "url",
    ["nonsense", "localhost:8000", "", "http://", "http://localhost:80a0", "http://[::1", "ftp://x",
     "http://host.invalid", "http://local host"],
)  # fmt: skip
def test_what_is_no_url_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    error_of(capsys, "status", f"--url={url}")


@pytest.mark.parametrize(
    "answer",
    [b"\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\n[]",
     b'HTTP/1.1 200 OK\r\n\r\n{"replicas": 1}', b'HTTP/1.1 200 OK\r\n\r\n{"replicas": [{}]}',
     b"HTTP/1.1 200 OK\r\n\r\n\xff", b"HTTP/1.1 502 Bad\r\n\r\n<html>", b""],
    ids=lambda answer: answer[-12:],
)  # fmt: skip
def test_whoever_is_no_minserve_is_one_line(
    answer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            error_of(capsys, "status", "--url", f"http://127.0.0.1:{sock.getsockname()[1]}")
        finally:
            thread.join(PATIENCE_S)


def test_a_refusal_is_told_with_its_reason(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no replica 7" in error_of(capsys, "drain", "7", "--url", url)


def test_a_server_without_replicas_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Server(ServerConfig()).create_runner()) as url:
        assert "still loading" in error_of(capsys, "status", "--url", url)


@pytest.mark.parametrize("key", ["secret", "schlüssel", "ключ"])
def test_the_key_comes_from_the_environment(
    controller: Controller,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MINSERVE_API_KEY", key)
    with guarded(controller, key) as url:
        assert len(table(capsys, "status", "--url", url)) == 3
        assert table(capsys, "drain", "1", "--url", url)[1]["state"] == "drained"


@pytest.mark.parametrize("key", [None, "", "wrong", "schlüssel"])
def test_without_the_right_key_nothing_is_told_or_done(
    controller: Controller,
    key: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MINSERVE_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MINSERVE_API_KEY", key)
    with guarded(controller, "secret") as url:
        for args in (["status"], ["drain", "1"]):
            assert "wrong API key" in error_of(capsys, *args, "--url", url)
    assert controller.table.replicas[1].state is ReplicaState.UP


def test_a_key_that_cannot_be_sent_is_not_printed(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINSERVE_API_KEY", "hidden\nvalue")
    line = error_of(capsys, "status", "--url", url)
    assert "MINSERVE_API_KEY" in line
    assert "hidden" not in line
