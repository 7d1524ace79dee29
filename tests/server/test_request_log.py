"""The log's line for each request: over real sockets, compared with what the client was told."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import RunningServer, hanging, late_stream, post, request_bytes
from waiting import wait_until

from minserve.errors import ConfigError
from minserve.log_lines import JsonLines, TextLines
from minserve.server.request_log import RequestLine
from minserve.server_config import ServerConfig

PATH = "/v1/completions"
SECRET = "a secret prompt"
BODY = {"model": "tiny", "prompt": SECRET, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
LONG = {**BODY, "max_tokens": 400}
EASY = {"ttft_ms": 500_000, "tpot_ms": 50_000}
IMPOSSIBLE = {"ttft_ms": 0.001, "on_unattainable": "reject"}
Start = Callable[..., RunningServer]


class Lines(logging.Handler):
    """Keeps the lines, in both formats."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.levels: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.msg, RequestLine)
        (line,) = JsonLines().format(record).splitlines()
        (text,) = TextLines().format(record).splitlines()
        self.texts.append(text)
        self.levels.append(record.levelno)
        self.told.append(json.loads(line))

    def next(self) -> dict[str, Any]:
        """The oldest line that was not asked for yet."""
        wait_until(lambda: self.told, "no line comes")
        return self.told.pop(0)


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("minserve.requests")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


# --- answers ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_line_tells_what_the_usage_tells(
    server: RunningServer, lines: Lines, stream: bool, n: int
) -> None:
    body = {**BODY, "n": n, "slo": EASY, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    status, headers, raw = post(server, PATH, body, {"x-request-id": "mine-1"})
    answer = json.loads(raw.split(b"data: ")[-2] if stream else raw)
    usage, line = answer["usage"], lines.next()
    assert (line["request_id"], headers["x-request-id"]) == ("mine-1", "mine-1")
    assert (line["method"], line["endpoint"], line["status"]) == ("POST", PATH, status)
    assert (line["error"], line["stream"], line["client"]) == (None, stream, "127.0.0.1")
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert line["output_tokens"] == usage["completion_tokens"] == 6 * n
    assert line["finish_reasons"] == {"length": n}
    slo = usage["slo"]
    assert (line["class"], line["admitted"]) == (slo["class"], slo["admitted"])
    assert line["outcome"] == "attained"
    assert slo["attained"]
    for name in ("ttft_ms", "mean_tpot_ms", "worst_token_lateness_ms"):
        assert line[name] == slo[name]
    assert {name: line[f"target_{name}"] for name in EASY} == slo["targets"]
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]
    assert line["replicas"] == []
    assert not lines.told


def test_without_an_slo_the_times_are_told_all_the_same(
    server: RunningServer, lines: Lines
) -> None:
    post(server, PATH, BODY)
    line = lines.next()
    assert line["class"] is line["outcome"] is line["admitted"] is line["target_ttft_ms"] is None
    assert 0 < line["ttft_ms"] + 5 * line["mean_tpot_ms"] < line["total_ms"] + 0.01


def test_every_line_has_the_same_fields(server: RunningServer, lines: Lines) -> None:
    post(server, PATH, {**BODY, "slo": EASY})
    post(server, PATH, {**BODY, "temperature": "hot"})
    post(server, "/v1/models", None, method="GET")
    post(server, PATH, {**BODY, "slo": {"finish_ms": 900_000}})
    first, second, third, fourth = (list(lines.next()) for _ in range(4))
    assert first == second == third == fourth
    page = (Path(__file__).parents[2] / "docs/observing.md").read_text()
    assert {name for name in first if f"`{name}`" not in page} == set()


def test_a_deadline_of_the_whole_answer_is_told_beside_the_time_that_it_took(
    server: RunningServer, lines: Lines
) -> None:
    _, _, raw = post(server, PATH, {**BODY, "slo": {"finish_ms": 900_000}})
    slo, line = json.loads(raw)["usage"]["slo"], lines.next()
    assert (line["target_finish_ms"], line["finish_ms"]) == (900_000.0, slo["finish_ms"])
    assert f"last token {slo['finish_ms']:.1f} of 900000.0 ms" in lines.texts[0]


def test_a_missed_slo_is_told_as_in_the_metrics(server: RunningServer, lines: Lines) -> None:
    post(server, PATH, {**BODY, "slo": {"ttft_ms": 0.001}})
    line = lines.next()
    assert (line["status"], line["admitted"], line["outcome"]) == (200, False, "best_effort")
    assert line["ttft_ms"] > line["target_ttft_ms"] == 0.001


# --- refusals and failures ---


@pytest.mark.parametrize(
    ("path", "body", "status", "error", "known"),
    [
        (PATH, {**BODY, "temperature": "hot"}, 400, "invalid_request_error", {}),
        (PATH, {**BODY, "model": "other"}, 404, "model_not_found", {}),
        (PATH, {**BODY, "prompt": "x" * 2**21}, 413, "invalid_request_error", {}),
        (PATH, {**BODY, "slo": IMPOSSIBLE}, 429, "slo_unattainable",
         {"class": "custom", "outcome": "rejected", "target_ttft_ms": 0.001, "admitted": False,
          "finish_reasons": {"error": 1}, "output_tokens": 0}),
        ("/nowhere", BODY, 404, "invalid_request_error", {"endpoint": "/nowhere"}),
        ("/v1/models", BODY, 405, "invalid_request_error", {"endpoint": "/v1/models"}),
    ],
)  # fmt: skip
def test_a_refusal_has_its_line(
    server: RunningServer,
    lines: Lines,
    path: str,
    body: Any,
    status: int,
    error: str,
    known: dict[str, Any],
) -> None:
    told, _, raw = post(server, path, body)
    answer, line = json.loads(raw)["error"], lines.next()
    assert told == line["status"] == status
    assert line["error"] == error == (answer["code"] or answer["type"])
    assert {name: line[name] for name in known} == known
    server.wait_until_free()
    assert not lines.told


def test_keys_queues_and_ends_have_their_lines(
    tiny_llama_dir: Path, start_server: Start, lines: Lines
) -> None:
    config = ServerConfig(api_key=("sesame",), served_model_name="tiny")
    server = start_server(tiny_llama_dir, config, max_queue=1)
    key = {"Authorization": "Bearer sesame"}
    assert post(server, PATH, BODY, {"Authorization": "Bearer open"})[0] == 401
    line = lines.next()
    assert (line["status"], line["error"], line["class"]) == (401, "invalid_api_key", None)
    sock = server.connect()
    with hanging(server):
        data = request_bytes(PATH, {**BODY, "slo": EASY})
        sock.sendall(data.replace(b"\r\n", b"\r\nAuthorization: Bearer sesame\r\n", 1))
        server.wait_until_busy()
        assert post(server, PATH, {**BODY, "slo": EASY}, key)[0] == 429
        line = lines.next()
        assert (line["error"], line["outcome"]) == ("queue_full", "rejected")
        server.loop.call_soon_threadsafe(setattr, server.engine, "_accepting", False)
        wait_until(lambda: not server.engine._accepting)
        assert post(server, PATH, BODY, key)[0] == 503
        assert lines.next()["error"] == "service_unavailable_error"
    assert lines.next()["outcome"] == "attained"
    sock.close()
    assert not any("sesame" in text or "open" in text for text in lines.texts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_has_its_line(
    server: RunningServer, lines: Lines, stream: bool
) -> None:
    with hanging(server, after=5):
        sock = server.connect()
        sock.sendall(request_bytes(PATH, {**LONG, "slo": EASY, "stream": stream}))
        server.wait_until_busy()
        if stream:
            assert sock.recv(2000).startswith(b"HTTP/1.1 200")
        sock.close()
        line = lines.next()
    assert line["error"] == "client_disconnected"
    assert line["status"] == (200 if stream else None)
    assert (line["class"], line["outcome"], line["target_ttft_ms"]) == ("custom", None, 500_000)
    if stream:
        assert line["ttft_ms"] > 0
        assert line["output_tokens"] > 0
    server.wait_until_free()


def test_a_failure_in_mid_stream_has_its_line(
    tiny_llama_dir: Path, start_server: Start, lines: Lines
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(request_timeout_s=60.0))
    body = {**{k: v for k, v in LONG.items() if k != "model"}, "slo": EASY}
    assert late_stream(server, PATH, body, 61.0)[0] == 200
    line = lines.next()
    assert (line["status"], line["error"], line["outcome"]) == (200, "request_timeout", "failed")
    assert line["finish_reasons"] == {}
    server.wait_until_free()


# --- what clients send ---


def test_no_client_forges_a_line_or_makes_it_long(server: RunningServer, lines: Lines) -> None:
    forged = 'x, trace 1, id 2" 12:00:00 INFO POST /v1/completions 200'
    post(server, PATH, BODY, {"x-request-id": forged})
    text = lines.texts[-1]
    assert lines.next()["request_id"] == forged
    assert text.endswith(f", id {json.dumps(forged)}")
    for path in ("/a%0a12:00:00%20INFO%20forged", "/" + "b" * 5000, "/%e2%80%a8%1b[2J"):
        post(server, path, None, method="GET")
        assert len(lines.next()["endpoint"]) <= 100
        text = lines.texts[-1]
        assert re.fullmatch(r"[\x20-\x7e]{,400}", text), text
        assert len(text) < 400
    post(server, "/v1/models/" + "c" * 5000, None, method="GET")
    assert lines.next()["endpoint"] == "/v1/models/{model}"
    post(server, "/nowhere?api_key=sesame", None, method="GET")
    post(server, PATH, BODY, method="PROPFIND")
    assert lines.next()["endpoint"] == "/nowhere"
    assert lines.next()["method"] == "OTHER"
    post(server, PATH, {**BODY, "model": "m\n12:00:00 forged", "user": "u" * 9000})
    lines.next()
    assert not any("forged\n" in text or "uuu" in text or "sesame" in text for text in lines.texts)


def test_no_prompt_and_no_output_is_told(server: RunningServer, lines: Lines) -> None:
    _, _, raw = post(server, PATH, BODY)
    output = json.loads(raw)["choices"][0]["text"]
    post(server, PATH, {**BODY, SECRET: 1})
    post(server, PATH, {**BODY, "slo": SECRET})
    post(server, PATH, {**BODY, "stop": [SECRET] * 100})
    lines.next(), lines.next(), lines.next(), lines.next()
    assert len(output) > 3
    assert not any(SECRET in text or output in text for text in lines.texts)


# --- which requests ---


def test_monitoring_is_quiet(server: RunningServer, lines: Lines) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        post(server, path, None, method="GET")
        lines.next()
    assert lines.levels == [logging.DEBUG, logging.DEBUG, logging.INFO]


def test_lines_are_for_errors_alone_or_for_nothing(
    tiny_llama_dir: Path, start_server: Start, lines: Lines
) -> None:
    for which, statuses in (("errors", [400]), ("off", [])):
        server = start_server(tiny_llama_dir, ServerConfig(log_requests=which))
        post(server, PATH, {"prompt": "a", "max_tokens": 1})
        post(server, PATH, {"prompt": "a", "max_tokens": -1})
        post(server, "/health", None, method="GET")
        assert [one["status"] for one in lines.told] == statuses
        lines.told.clear()
    for setting in ({"log_requests": "some"}, {"log_format": "xml"}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            ServerConfig(**setting)
