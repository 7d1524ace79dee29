"""The log's line for each request: what was asked and promised, what came of it, and when.

Clients choose their request's id and path alone of what stands in a line; both are bounded. The
fields of a line in JSON are listed in ``docs/observing.md``.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from aiohttp import web

from minserve.log_lines import Event, one_line
from minserve.server.request_record import RECORD, RequestRecord
from minserve.server.routes import Handler, generates
from minserve.server.slo_http import in_ms, targets_object
from minserve.server.trace_context import trace_headers, trace_id_of
from minserve.server.tracing import make_tracing
from minserve.server_config import ServerConfig

logger = logging.getLogger("minserve.requests")

# Monitoring systems ask these every few seconds.
QUIET = ("/health", "/metrics")
# An id that needs no quotes to be told from the words around it.
_PLAIN = re.compile(r"[A-Za-z0-9._:/+=@-]+")


class RequestLog:
    """The outermost middleware: it writes a line when a request has ended, in whatever way.

    It also begins and ends the request's trace.

    Raises:
        ConfigError: if traces are wanted and cannot be made.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._which = config.log_requests
        self._tracing = make_tracing(config)

    @web.middleware
    async def watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run a handler, and write the line of its request."""
        record = request[RECORD] = RequestRecord.of(request)
        headers = trace_headers(request)
        record.trace_id = trace_id_of(headers)
        if self._tracing is not None and generates(request):
            self._tracing.begin(record, headers)
        try:
            response = await handler(request)
            record.status = response.status
            return response
        finally:
            record.end()
            line = RequestLine(record)
            self._write(record, line)
            if self._tracing is not None and record.span is not None:
                self._tracing.end(record, line.fields())

    async def close(self, app: web.Application) -> None:
        """Send the last traces; a signal of aiohttp's for the end of the application."""
        if self._tracing is not None:
            await self._tracing.close()

    def _write(self, record: RequestRecord, line: RequestLine) -> None:
        if self._which == "all" or (self._which == "errors" and record.has_failed):
            level = logging.DEBUG if record.endpoint in QUIET else logging.INFO
            logger.log(level, line)


class RequestLine(Event):
    """A request's line of log, which is made when a format is known."""

    __slots__ = ("_record",)
    name = "request"

    def __init__(self, record: RequestRecord) -> None:
        self._record = record

    def fields(self) -> dict[str, Any]:
        """Return all fields; ``None`` where there is nothing to tell. Times are in milliseconds."""
        record, generation = self._record, self._record.generation
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "trace_id": record.trace_id,
            "client": record.client,
            "method": record.method,
            "endpoint": record.endpoint,
            "status": record.status,
            "error": record.error,
            "total_ms": in_ms(record.ended_s - record.began_s),
            **_NOTHING_GENERATED,
        }
        if generation is None:
            return fields
        report, targets, reply = generation.report, generation.targets, generation.reply
        fields["stream"] = generation.call.stream
        if generation.slo is not None:
            fields["class"] = generation.slo.name
        if targets is not None:
            fields |= {f"target_{name}": ms for name, ms in targets_object(targets).items()}
        if report is not None:
            fields["admitted"] = report.admitted
            fields["worst_token_lateness_ms"] = in_ms(report.worst_token_lateness_s)
            fields["finish_ms"] = in_ms(report.finish_s)
        if (outcome := record.outcome) is not None:
            fields["outcome"] = outcome.value
        if reply is not None:
            usage = reply.usage()
            times = reply.times.values()
            starts = [one.started_s for one in times if one.started_s is not None]
            fields |= {
                "engine_request_id": generation.handles[0].request_id,
                "prompt_tokens": usage["prompt_tokens"],
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "output_tokens": usage["completion_tokens"],
                "finish_reasons": dict(reply.ends),
                "queue_ms": in_ms(max(starts)) if starts else None,
                "ttft_ms": in_ms(generation.ttft_s),
                "mean_tpot_ms": in_ms(generation.mean_tpot_s),
                "replicas": generation.replicas,
            }
        return fields

    def __str__(self) -> str:
        """Return the line for people."""
        record, told = self._record, self.fields()
        status = "-" if record.status is None else str(record.status)
        words = [f"{record.method} {one_line(record.endpoint)} {status}"]
        if record.error is not None:
            words.append(record.error)
        if told["prompt_tokens"] is not None:
            words.append(_tokens(told))
        if told["class"] is not None:
            words.append(_promise(told))
        for name in ("ttft", "mean_tpot"):
            if told[f"{name}_ms"] is not None:
                words.append(_time(name, told))
        if told["finish_ms"] is not None and told["target_finish_ms"] is not None:
            words.append(_time("finish", told))
        if told["replicas"]:
            words.append(f"replica {'+'.join(map(str, told['replicas']))}")
        words.append(f"{told['total_ms']:.1f} ms in all")
        words.append(f"from {record.client}")
        if record.trace_id is not None:
            words.append(f"trace {record.trace_id}")
        # At the end, since clients may choose it.
        given = record.request_id
        words.append(f"id {given if _PLAIN.fullmatch(given) else json.dumps(given)}")
        return ", ".join(words)


_NOTHING_GENERATED = dict.fromkeys(
    (
        "stream",
        "class",
        "target_ttft_ms",
        "target_tpot_ms",
        "target_thinking_tpot_ms",
        "target_finish_ms",
        "admitted",
        "outcome",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
        "finish_reasons",
        "queue_ms",
        "ttft_ms",
        "mean_tpot_ms",
        "worst_token_lateness_ms",
        "finish_ms",
        "replicas",
        "engine_request_id",
    )
)
_NAMES = {"ttft": "TTFT", "mean_tpot": "TPOT", "finish": "last token"}


def _tokens(told: dict[str, Any]) -> str:
    cached = f" ({told['cached_tokens']} cached)" if told["cached_tokens"] else ""
    ends = " ".join(
        reason if num == 1 else f"{num}x{reason}" for reason, num in told["finish_reasons"].items()
    )
    return f"{told['prompt_tokens']}{cached} + {told['output_tokens']} tokens {ends}".rstrip()


def _promise(told: dict[str, Any]) -> str:
    return " ".join(filter(None, (told["class"], told["outcome"])))


def _time(name: str, told: dict[str, Any]) -> str:
    """Return a time, beside what it was to be at most."""
    target = told[f"target_{name.removeprefix('mean_')}_ms"]
    most = "" if target is None else f" of {target:.1f}"
    return f"{_NAMES[name]} {told[f'{name}_ms']:.1f}{most} ms"
