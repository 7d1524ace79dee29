"""Traces of generations, received over OTLP/HTTP by a server of this file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from live_server import RunningServer, hanging, late_stream, post, request_bytes
from multidict import CIMultiDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from waiting import PATIENCE_S, wait_until

from minserve.errors import ConfigError
from minserve.server import tracing
from minserve.server.trace_context import MAX_STATE, trace_headers, trace_id_of
from minserve.server.tracing import ENDPOINTS, make_tracing
from minserve.server_config import ServerConfig

PATH = "/v1/completions"
BODY = {"prompt": "The quick brown fox", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
EASY = {"ttft_ms": 500_000, "tpot_ms": 50_000}
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{CALLER}-01"
Start = Callable[..., RunningServer]


class Collector:
    """Keeps the spans that come over HTTP, with what their senders say of themselves.

    Attributes:
        url: where it listens.
        status: of its answers.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.paths: set[str] = set()
        self.status = 200
        self.num_asked = 0

    def take(self, path: str, data: bytes) -> None:
        self.num_asked += 1
        self.paths.add(path)
        if self.status != 200:
            return
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            self.services |= {
                one.value.string_value
                for one in resource.resource.attributes
                if one.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def servers(self, num: int = 1) -> list[Span]:
        """The spans of so many requests."""
        kind = Span.SPAN_KIND_SERVER
        return wait_until(
            lambda: (
                found if len(found := [s for s in self.spans if s.kind == kind]) >= num else None
            ),
            "no span comes",
        )

    def children(self, parent: Span) -> list[Span]:
        return [span for span in self.spans if span.parent_span_id == parent.span_id]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(collector.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        collector.url = f"http://127.0.0.1:{http.server_port}"
        yield collector
        http.shutdown()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    # Spans go out after a moment, and not after 5 s.
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with collecting() as collector:
        yield collector


@pytest.fixture
def traced(tiny_llama_dir: Path, start_server: Start, collector: Collector) -> RunningServer:
    config = ServerConfig(served_model_name="tiny", otlp_endpoint=collector.url)
    return start_server(tiny_llama_dir, config)


def attributes(span: Span) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(one) for one in found.values] if kind == "array_value" else found

    return {one.key: plain(one.value) for one in span.attributes}


# --- spans ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_is_a_span_of_its_callers_trace(
    traced: RunningServer, collector: Collector, stream: bool
) -> None:
    body = {
        **BODY,
        "slo": EASY,
        "n": 2,
        "stream": stream,
        "stream_options": {"include_usage": True},
    }
    if not stream:
        del body["stream_options"]
    headers = {"traceparent": PARENT, "tracestate": "a=1,b=2", "x-request-id": "mine"}
    _, answered, raw = post(traced, PATH, body, headers)
    usage = json.loads(raw.split(b"data: ")[-2] if stream else raw)["usage"]
    assert "traceparent" not in answered
    (span,) = collector.servers()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, CALLER)
    assert span.trace_state == "a=1,b=2"
    assert span.name == f"POST {PATH}"
    told = attributes(span)
    assert {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.stream": stream,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ["length"],
        "minserve.request_id": "mine",
        "minserve.slo.class": "custom",
        "minserve.slo.promised": usage["slo"]["admitted"],
        "minserve.slo.attained": usage["slo"]["attained"],
        "minserve.slo.outcome": "attained",
        "minserve.slo.target_ttft_ms": 500_000.0,
        "minserve.ttft_ms": usage["slo"]["ttft_ms"],
        "minserve.mean_tpot_ms": usage["slo"]["mean_tpot_ms"],
    }.items() <= told.items()
    assert "error.type" not in told
    assert span.status.code == Status.STATUS_CODE_UNSET
    page = (Path(__file__).parents[2] / "docs/observing.md").read_text()
    assert {name for name in told if f"`{name}`" not in page} == set()


def test_the_stages_of_each_output_follow_each_other(
    traced: RunningServer, collector: Collector
) -> None:
    post(traced, PATH, {**BODY, "n": 2})
    (span,) = collector.servers()
    children = wait_until(lambda: len(found := collector.children(span)) == 6 and found)
    for output in (0, 1):
        queue, prefill, decode = sorted(
            (one for one in children if attributes(one)["minserve.output"] == output),
            key=lambda one: one.start_time_unix_nano,
        )
        assert [queue.name, prefill.name, decode.name] == ["queue", "prefill", "decode"]
        assert span.start_time_unix_nano <= queue.start_time_unix_nano
        assert queue.end_time_unix_nano == prefill.start_time_unix_nano
        assert prefill.end_time_unix_nano == decode.start_time_unix_nano
        assert decode.start_time_unix_nano < decode.end_time_unix_nano <= span.end_time_unix_nano
        assert attributes(decode)["gen_ai.usage.output_tokens"] == 6
        assert {one.trace_id for one in (queue, prefill, decode)} == {span.trace_id}


def test_the_line_of_log_names_the_trace(
    traced: RunningServer, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "minserve.requests"):
        post(traced, PATH, BODY)
        post(traced, PATH, BODY, {"traceparent": PARENT})
        post(traced, "/v1/models", None, {"traceparent": PARENT}, method="GET")
        first, second = collector.servers(2)
    ids = [record.msg.fields()["trace_id"] for record in caplog.records[:3]]
    assert ids == [first.trace_id.hex(), second.trace_id.hex(), TRACE]
    assert first.parent_span_id == b""
    assert f"trace {TRACE}" in caplog.records[1].getMessage()
    assert collector.services == {"minserve"}
    assert collector.paths == {"/v1/traces"}
    assert len([s for s in collector.spans if s.kind == Span.SPAN_KIND_SERVER]) == 2


def test_without_a_collector_the_line_names_the_callers_trace(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "minserve.requests"):
        post(server, PATH, {**BODY, "model": "tiny"}, {"traceparent": PARENT})
        post(server, PATH, {**BODY, "model": "tiny"}, {"traceparent": PARENT.upper()})
    ids = [record.msg.fields()["trace_id"] for record in caplog.records]
    assert ids == [TRACE, None]


@pytest.mark.parametrize(
    ("fields", "error", "status", "is_failure"),
    [
        ({"temperature": "hot"}, "invalid_request_error", 400, False),
        ({"slo": {"ttft_ms": 0.001, "on_unattainable": "reject"}}, "slo_unattainable", 429, False),
    ],
)
def test_a_refusal_is_no_failure_of_the_server(
    traced: RunningServer,
    collector: Collector,
    fields: dict[str, Any],
    error: str,
    status: int,
    is_failure: bool,
) -> None:
    post(traced, PATH, {**BODY, **fields})
    (span,) = collector.servers()
    told = attributes(span)
    assert (told["error.type"], told["http.response.status_code"]) == (error, status)
    assert (span.status.code == Status.STATUS_CODE_ERROR) == is_failure


def test_failures_and_clients_that_leave(
    tiny_llama_dir: Path, start_server: Start, collector: Collector
) -> None:
    config = ServerConfig(otlp_endpoint=collector.url, request_timeout_s=60.0)
    server = start_server(tiny_llama_dir, config)
    long = {**BODY, "max_tokens": 400, "stream": True}
    with hanging(server, after=5):
        with server.connect() as sock:
            sock.sendall(request_bytes(PATH, long))
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        (left,) = collector.servers()
    assert attributes(left)["error.type"] == "client_disconnected"
    server.wait_until_free()
    assert late_stream(server, PATH, long, 61.0)[0] == 200
    _, late = collector.servers(2)
    assert attributes(late)["error.type"] == "request_timeout"
    assert late.status.code == Status.STATUS_CODE_ERROR


# --- a collector that is not there ---


class Warnings(logging.Handler):
    """What the root logger's handlers get; pytest's own see more than that."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    handler = Warnings()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def test_a_collector_that_is_down_is_one_warning(
    traced: RunningServer, collector: Collector, warnings: Warnings
) -> None:
    collector.status = 400  # which is not tried again, so that this test is quick
    for num in (1, 2, 3):
        assert post(traced, PATH, BODY)[0] == 200
        wait_until(lambda num=num: collector.num_asked >= num)
    (warning,) = wait_until(lambda: warnings.texts)
    assert "traces cannot be sent" in warning
    assert "400" in warning
    collector.status = 200
    post(traced, PATH, BODY)
    collector.servers()
    _, again = wait_until(lambda: len(warnings.texts) == 2 and warnings.texts)
    assert "are sent again" in again


def test_spans_that_cannot_be_sent_are_bounded(
    monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, start_server: Start
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    go_on = threading.Event()
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    with collecting() as collector:
        monkeypatch.setattr(collector, "take", lambda *_: go_on.wait(PATIENCE_S))
        server = start_server(tiny_llama_dir, ServerConfig(otlp_endpoint=collector.url))
        for _ in range(20):
            assert post(server, PATH, {**BODY, "max_tokens": 1})[0] == 200
        (thread,) = [t for t in threading.enumerate() if t.name.startswith("OtelBatch")][-1:]
        processor = thread._target.__self__  # type: ignore[attr-defined]
        assert len(processor._queue) <= 4
        go_on.set()


# --- settings ---


def test_the_sdks_variables_name_a_collector_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINTS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    assert make_tracing(ServerConfig()) is None
    for name, path in zip(ENDPOINTS, ("", "/v1/traces"), strict=True):
        monkeypatch.setenv(name, "http://127.0.0.1:9/x")
        made = make_tracing(ServerConfig())
        assert made._exporter._inner._endpoint == f"http://127.0.0.1:9/x{path}"
        made._provider.shutdown()
        for off, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
            with monkeypatch.context() as also:
                also.setenv(off, value)
                assert make_tracing(ServerConfig()) is None
        monkeypatch.delenv(name)


def test_a_service_has_the_name_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing._resource().attributes["service.name"] == "minserve"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front")
    assert tracing._resource().attributes["service.name"] == "front"


def test_what_is_no_url_is_refused() -> None:
    for wrong in ("localhost:4318", "grpc://localhost", "http://", "http://a b"):
        with pytest.raises(ConfigError, match="otlp_endpoint"):
            ServerConfig(otlp_endpoint=wrong)


MISSING = """
import os, sys
sys.modules["opentelemetry"] = None
from minserve.server_config import ServerConfig
from minserve.errors import ConfigError
from minserve.server.tracing import make_tracing
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
assert make_tracing(ServerConfig()) is None
try:
    make_tracing(ServerConfig(otlp_endpoint="http://127.0.0.1:9"))
except ConfigError as error:
    print(error)
"""


def test_without_the_extra_it_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert ".venv/bin/pip install -e '.[otel]'" in done.stdout, done.stderr
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in done.stderr
    assert "'.[otel]'" in done.stderr


def test_opentelemetry_is_imported_where_it_is_wanted_alone() -> None:
    code = (
        "import sys; from minserve.server_config import ServerConfig; from minserve.server.app import Server;"
        "Server(ServerConfig()); sys.exit(any(m.startswith('opentelemetry') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- headers ---


@pytest.mark.parametrize(
    ("parent", "valid"),
    [
        (PARENT, True),
        (f"  {PARENT}\t", True),
        (f"00-{TRACE}-{CALLER}-00", True),
        (f"01-{TRACE}-{CALLER}-01", True),
        (f"cc-{TRACE}-{CALLER}-01-more", True),
        (f"cc-{TRACE}-{CALLER}-01.more", False),
        (f"00-{TRACE}-{CALLER}-01-more", False),
        (f"ff-{TRACE}-{CALLER}-01", False),
        (f"00-{'0' * 32}-{CALLER}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (PARENT.upper(), False),
        (PARENT[:-1], False),
        (f"00-{TRACE}{CALLER}-01", False),
        (f"0x-{TRACE}-{CALLER}-01", False),
        (f"cc-{TRACE}-{CALLER}-01-" + "m" * 1000, False),
        ("", False),
    ],
)
def test_headers_are_valid_as_w3c_says_and_as_the_sdk_reads_them(parent: str, valid: bool) -> None:
    request = make_mocked_request("GET", "/", headers={"traceparent": parent})
    headers = trace_headers(request)
    assert trace_id_of(headers) == (TRACE if valid else None)
    context = TraceContextTextMapPropagator().extract({"traceparent": parent})
    assert get_current_span(context).get_span_context().is_valid == valid
    assert bool(headers) == valid


def test_two_parents_are_none_and_states_are_joined() -> None:
    both = CIMultiDict([("traceparent", PARENT), ("traceparent", PARENT)])
    assert trace_headers(make_mocked_request("GET", "/", headers=both)) == {}
    states = CIMultiDict([("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")])
    assert trace_headers(make_mocked_request("GET", "/", headers=states)) == {
        "traceparent": PARENT,
        "tracestate": "a=1,b=2",
    }
    states["tracestate"] = "a=" + "1" * MAX_STATE
    assert trace_headers(make_mocked_request("GET", "/", headers=states)) == {"traceparent": PARENT}
    alone = make_mocked_request("GET", "/", headers={"tracestate": "a=1"})
    assert trace_headers(alone) == {}
