"""OpenTelemetry: a span for each generation, sent over OTLP/HTTP; needs the extra ``otel``.

Spans are made from a `RequestRecord` when it has ended, with the times that the engine has told, so
that the way of a request costs nothing more while it runs. A thread of the SDK's sends them in batches.
Its queue has a bound: what cannot be sent is lost, and nobody waits for it.

Attributes follow OpenTelemetry's conventions for HTTP and for generative AI; minserve's own are the
fields of the log's line. They are listed in ``docs/observing.md``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from minserve.errors import ConfigError
from minserve.outputs import OutputTimes
from minserve.server_config import ServerConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from minserve.server.request_record import RequestRecord

logger = logging.getLogger(__name__)

GET_OPENTELEMETRY = ".venv/bin/pip install -e '.[otel]'"
# Variables of the SDK's that name a collector.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# Seconds for sending the last spans when the server ends.
FLUSH_S = 3.0
# Outputs of a request that have spans of their own.
MOST_OUTPUTS = 8
# A client can cause these warnings of the API's by what it sends.
_ABOUT_CLIENTS = ("opentelemetry.trace", "opentelemetry.attributes")


def make_tracing(config: ServerConfig) -> Tracing | None:
    """Return what makes the spans; ``None`` where no collector is named.

    A collector is named by ``--otlp-endpoint`` or by the variables `ENDPOINTS`. All other settings are
    those of the SDK's variables, such as ``OTEL_EXPORTER_OTLP_HEADERS``.

    Raises:
        ConfigError: if it is named by the flag, and the packages are missing.
    """
    endpoint = config.otlp_endpoint
    if endpoint is None and not _is_asked_for():
        return None
    try:
        from minserve.server.otlp import make_exporter
    except ImportError as error:
        if endpoint is not None:
            raise ConfigError(
                f"otlp_endpoint needs more packages: {GET_OPENTELEMETRY} ({error})"
            ) from None
        logger.warning(
            "%s is set, but without packages for it: %s", _is_asked_for(), GET_OPENTELEMETRY
        )
        return None
    return Tracing(make_exporter(endpoint))


def _is_asked_for() -> str | None:
    """Return the variable that names a collector, unless another one switches traces off."""
    env = os.environ
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if env.get("OTEL_TRACES_EXPORTER", "otlp").strip() != "otlp":
        return None
    return next((name for name in ENDPOINTS if env.get(name, "").strip()), None)


class Tracing:
    """Makes the spans of requests.

    Args:
        exporter: sends finished spans.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        for name in _ABOUT_CLIENTS:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._exporter = exporter
        self._provider: TracerProvider = TracerProvider(
            resource=_resource(), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("minserve", version("minserve"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Begin the span of a request.

        Args:
            headers: those that name the trace it belongs to, checked; without any it begins one.
        """
        from opentelemetry.trace import SpanKind, format_trace_id

        record.began_ns = time.time_ns()
        span = self._tracer.start_span(
            f"{record.method} {record.endpoint}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=record.began_ns,
        )
        record.span = span
        record.trace_id = format_trace_id(span.get_span_context().trace_id)

    def end(self, record: RequestRecord, fields: Mapping[str, Any]) -> None:
        """End the span of a request that has ended, with spans of what its outputs did.

        Args:
            fields: those of its line of log.
        """
        span = record.span
        if span is None:
            return
        if span.is_recording():
            span.set_attributes(_attributes(record, fields))
            if (record.error is not None and (record.status is None or record.status < 400)) or (
                record.status is not None and record.status >= 500
            ):
                _note_failure(span, record.error)
            self._add_stages(span, record)
        span.end(_nanoseconds(record, record.ended_s))

    def _add_stages(self, span: Span, record: RequestRecord) -> None:
        """Add a span for each stage of the first outputs."""
        from opentelemetry.trace import set_span_in_context

        generation = record.generation
        if generation is None or generation.reply is None:
            return
        inside = set_span_in_context(span)
        for output, times in sorted(generation.reply.times.items())[:MOST_OUTPUTS]:
            for name, begin_s, end_s in _stages(times):
                child = self._tracer.start_span(
                    name,
                    context=inside,
                    start_time=_nanoseconds(record, generation.came_s + begin_s),
                    attributes={"minserve.output": output},
                )
                if name == "decode":
                    child.set_attribute("gen_ai.usage.output_tokens", times.num_tokens)
                    child.set_attribute("minserve.num_preemptions", times.num_preemptions)
                child.end(_nanoseconds(record, generation.came_s + end_s))

    async def close(self) -> None:
        """Send the last spans, as far as that goes in `FLUSH_S` seconds."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop may have ended meanwhile
                loop.call_soon_threadsafe(done.set)

        # No other kind of thread: Python's own end would wait for it.
        threading.Thread(target=shut_down, name="traces-end", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), FLUSH_S)
        except TimeoutError:
            logger.warning("the last traces could not be sent within %g s", FLUSH_S)


def _resource() -> Any:
    """Return what all spans tell of this process; the SDK's variables may say more."""
    from opentelemetry.sdk.resources import Resource

    own = {"service.version": version("minserve")}
    named = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in named:
        own["service.name"] = "minserve"
    return Resource.create(own)


def _note_failure(span: Span, error: str | None) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, error))


def _nanoseconds(record: RequestRecord, at_s: float) -> int:
    """Return a time of the monotonic clock in nanoseconds since 1970."""
    return record.began_ns + round((at_s - record.began_s) * 1e9)


def _stages(times: OutputTimes) -> list[tuple[str, float, float]]:
    """Return the stages that an output has gone through, each with its two ends."""
    stages = []
    started, first, last = times.started_s, times.first_token_s, times.last_token_s
    if started is not None:
        stages.append(("queue", 0.0, started))
        if first is not None:
            stages.append(("prefill", started, first))
    if first is not None and last is not None:
        stages.append(("decode", first, last))
    return stages


def _attributes(record: RequestRecord, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a request's span, as far as they are known."""
    told: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.endpoint,
        "http.response.status_code": record.status,
        "client.address": record.client,
        "error.type": record.error,
        "minserve.request_id": record.request_id,
        "minserve.slo.class": fields["class"],
        "minserve.slo.promised": fields["admitted"],
        "minserve.slo.outcome": fields["outcome"],
        "minserve.slo.attained": _is_attained(fields["outcome"]),
        **{f"minserve.{name}": fields[name] for name in _OWN_TIMES},
        **{f"minserve.slo.{name}": fields[name] for name in _OWN_SLO},
        "minserve.engine_request_id": fields["engine_request_id"],
        "minserve.replicas": fields["replicas"] or None,
    }
    generation = record.generation
    if generation is not None:
        call = generation.call
        told |= {
            "gen_ai.operation.name": "chat" if call.chat else "text_completion",
            "gen_ai.provider.name": "minserve",
            "gen_ai.request.stream": call.stream,
            "gen_ai.request.choice.count": call.params.n,
            **{f"gen_ai.request.{name}": getattr(call.params, name) for name in _SETTINGS},
            "minserve.priority": call.priority or None,
            "gen_ai.usage.input_tokens": fields["prompt_tokens"],
            "gen_ai.usage.output_tokens": fields["output_tokens"],
            "gen_ai.usage.cache_read.input_tokens": fields["cached_tokens"],
            "gen_ai.response.finish_reasons": list(fields["finish_reasons"] or ()) or None,
        }
        if (reply := generation.reply) is not None:
            told["gen_ai.response.id"] = reply.answer_id
            told["gen_ai.request.model"] = told["gen_ai.response.model"] = reply.model
    return {name: value for name, value in told.items() if value is not None}


def _is_attained(outcome: str | None) -> bool | None:
    return None if outcome is None else outcome == "attained"


_SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "seed",
             "frequency_penalty", "presence_penalty")  # fmt: skip
_OWN_TIMES = ("queue_ms", "ttft_ms", "mean_tpot_ms")
_OWN_SLO = (
    "target_ttft_ms",
    "target_tpot_ms",
    "target_thinking_tpot_ms",
    "target_finish_ms",
    "finish_ms",
    "worst_token_lateness_ms",
)
