"""`RequestRecord`: what there is to tell of a request once it has been answered.

The edge and the handlers fill it in on the way; the log's line and the trace are made from it. It holds
no text of a prompt or an output, and no key.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from minserve.server.request_ids import request_id
from minserve.server.routes import route_of
from minserve.slo.attainment import Outcome, SLOReport
from minserve.slo.objectives import SLO, Targets

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from minserve.server.engine_face import Handle
    from minserve.server.errors import HttpError
    from minserve.server.protocol import GenerationCall
    from minserve.server.reply_base import ReplyBase

# The error of a request whose client has closed the connection before its answer was complete.
DISCONNECTED = "client_disconnected"
# Characters of a path that is no route's.
MAX_PATH = 100
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


@dataclass(slots=True, kw_only=True)
class GenerationRecord:
    """What a request has asked of the engine, and what has come of it.

    Attributes:
        came_s: when the body had come, in seconds of ``time.monotonic()``: SLOs count from then.
        reply: its answer so far; ``None`` where the engine has not taken the request.
        report: once it is closed, the report that the usage has: of the output that did worst.
    """

    call: GenerationCall
    slo: SLO | None
    came_s: float
    handles: Sequence[Handle] = ()
    reply: ReplyBase | None = None
    report: SLOReport | None = None

    def close(self) -> None:
        """Note that nothing more will come."""
        self.report = None if self.reply is None else self.reply.slo_report()

    @property
    def targets(self) -> Targets | None:
        """The SLO in seconds."""
        if self.report is not None:
            return self.report.targets
        return self.handles[0].targets if self.handles else None

    @property
    def ttft_s(self) -> float | None:
        """Seconds until the first token of the output that began last, or as far as is known here."""
        if self.report is not None:
            return self.report.ttft_s
        if self.reply is None:
            return None
        times = self.reply.times.values()
        if firsts := [one.first_token_s for one in times if one.first_token_s is not None]:
            return max(firsts)
        first_s = self.reply.first_token_s
        return None if first_s is None else first_s - self.came_s

    @property
    def mean_tpot_s(self) -> float | None:
        """Mean seconds per token behind the first one: of the slowest output, where that is known."""
        if self.report is not None:
            return self.report.mean_tpot_s
        if self.reply is None:
            return None
        times = self.reply.times.values()
        if paces := [one.mean_tpot_s for one in times if one.mean_tpot_s is not None]:
            return max(paces)
        first_s, last_s = self.reply.first_token_s, self.reply.last_token_s
        num_tokens = self.reply.usage()["completion_tokens"]
        if first_s is None or last_s is None or num_tokens < 2 or self.num_outputs > 1:
            return None
        return (last_s - first_s) / (num_tokens - 1)

    @property
    def num_outputs(self) -> int:
        """How many outputs were asked for."""
        return len(self.handles) * self.call.params.n

    @property
    def replicas(self) -> list[int]:
        """The numbers of the replicas that had it, without those that were lost meanwhile."""
        numbers = {handle.replica for handle in self.handles}
        return sorted(one for one in numbers if one is not None)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """A request, from the end of its headers to the end of its answer.

    Attributes:
        request_id: the header ``x-request-id`` of the answer.
        client: the address that it came from.
        endpoint: the route, or the beginning of a path that no route has.
        began_s, ended_s: in seconds of ``time.monotonic()``.
        status: of the answer; ``None`` if the client left before it began.
        error: a code of the errors that clients are told, or `DISCONNECTED`; ``None`` if the answer was
            complete.
        trace_id: 32 hexadecimal digits; ``None`` where the request belongs to no trace.
        span: its span, where it is traced; it began at ``began_ns``, in nanoseconds since 1970.
    """

    request_id: str
    client: str
    method: str
    endpoint: str
    began_s: float
    ended_s: float = 0.0
    status: int | None = None
    error: str | None = None
    trace_id: str | None = None
    span: Span | None = None
    began_ns: int = 0
    generation: GenerationRecord | None = None

    @classmethod
    def of(cls, request: web.Request) -> RequestRecord:
        """Return the record of a request that begins now."""
        return cls(
            request_id=request_id(request),
            client=request.remote or "",
            method=request.method if request.method in _METHODS else "OTHER",
            endpoint=route_of(request) or request.rel_url.raw_path[:MAX_PATH],
            began_s=time.monotonic(),
        )

    def end(self) -> None:
        """Note that the answer has ended now."""
        self.ended_s = time.monotonic()
        if self.generation is not None:
            self.generation.close()

    @property
    def has_failed(self) -> bool:
        """True if the request was refused or its answer is not complete."""
        return self.error is not None or self.status is None or self.status >= 400

    @property
    def outcome(self) -> Outcome | None:
        """What became of the SLO; ``None`` without one, and where the client left before the end."""
        generation = self.generation
        if generation is None or generation.slo is None:
            return None
        report = generation.report
        if report is not None and (self.error is None or not report.attained):
            return report.outcome
        if self.error is None or self.error == DISCONNECTED:
            return None
        return Outcome.FAILED if generation.handles else Outcome.REJECTED


RECORD = web.RequestKey("record", RequestRecord)


def note_error(request: web.Request, error: HttpError) -> None:
    """Note the error that a request's client is told."""
    if (record := request.get(RECORD)) is not None:
        record.error = error.code or error.kind


def note_disconnect(request: web.Request) -> None:
    """Note that a request ends without its answer, because its connection is closed."""
    if (record := request.get(RECORD)) is not None and record.error is None:
        record.error = DISCONNECTED


async def note_status(request: web.Request, response: web.StreamResponse) -> None:
    """Note the status of an answer; a signal of aiohttp's that comes before the headers are sent."""
    if (record := request.get(RECORD)) is not None:
        record.status = response.status
