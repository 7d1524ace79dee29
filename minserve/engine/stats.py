"""`EngineStats`: the counts of all that an engine has done so far; the core counts.

Requests here are outputs: one that asks for ``n`` of them counts ``n`` times, its prompt once.
All times are seconds on the engine's clock. A request arrives when it has been checked and its
prompt tokenized, and a token has come when its iteration ends: parsing before and the
network behind are not in these numbers, just as they are not in an SLO's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields, replace
from typing import Any

from minserve.activity import BatchTokens
from minserve.engine.batch import Scheduled
from minserve.engine.guarded_planning import REASONS
from minserve.engine.speculation.proposer import SpeculationStats
from minserve.planner.plan import IterationPlan
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import FinishReason, RequestEvent, Sequence
from minserve.slo.attainment import Outcome, SLOReport
from minserve.slo.objectives import CUSTOM, Standing

# Bounds of buckets, in steps of 1, 2, 5: of an iteration, and of a request.
ITERATION_SECONDS = tuple(float(f"{m}e{e}") for e in range(-5, 1) for m in (1, 2, 5))
REQUEST_SECONDS = tuple(float(f"{m}e{e}") for e in range(-3, 3) for m in (1, 2, 5))
# Of measured over predicted time.
SURPRISES = (*(n / 20 for n in range(10, 31)), 1.75, 2.0, 2.5, 3.0, 5.0)
NUM_TOKENS = (0, *(2**e for e in range(15)))


class Histogram:
    """Counts how often a number fell into which bucket; cheap enough for every token.

    Attributes:
        bounds: upper bounds of the buckets, rising; a bound belongs to the bucket below it.
        counts: one for each bucket, and a last one for numbers above all bounds.
        total: sum of all numbers observed.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one number."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        """Return a copy of the counts as they are."""
        twin = Histogram(self.bounds)
        twin.counts, twin.total = self.counts.copy(), self.total
        return twin


def _of_iterations() -> Histogram:
    return Histogram(ITERATION_SECONDS)


def _of_requests() -> Histogram:
    return Histogram(REQUEST_SECONDS)


def _of_surprises() -> Histogram:
    return Histogram(SURPRISES)


def _of_tokens() -> Histogram:
    return Histogram(NUM_TOKENS)


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counts since the start, and the state after the newest iteration.

    Attributes:
        num_running, num_waiting: sequences that run and that wait now.
        kv_usage: share of the KV blocks in use, 0 to 1; cached blocks that nobody uses are free.
        num_prefix_queries, num_prefix_hits: tokens of started sequences that were looked up
            in the prefix cache, and of these those found.
        num_preemptions: times that a running sequence gave up its blocks.
        num_prompt_tokens: prompt tokens of requests whose first output has begun.
        num_generation_tokens: tokens of all outputs.
        finished: outputs that ended, by reason.
        slo_requests: outputs with an SLO that ended, by class and outcome. The classes are
            those of `add_classes`; any other counts as ``custom``. An aborted output counts
            only where it was late by then.
        ttft_s: seconds from arrival to the first token.
        inter_token_s: seconds between two deliveries to one output; by speculation a delivery may
            bring several tokens.
        e2e_s: seconds from arrival to the last token, of outputs that stopped or reached their
            length.
        queue_s: seconds from arrival to the first start.
        prefill_s: seconds from the newest start before the first token to that token.
        decode_s: seconds from the first to the last token, of the outputs of ``e2e_s``.
        request_prompt_tokens, request_generation_tokens: tokens of their prompts and of themselves.
        iteration_s: seconds of iterations that ran something, with the planning that they waited
            for.
        predicted_s: seconds of the same iterations as the planner predicted them, where it could.
        profiled_s: seconds of the same iterations by the device's profile, which knows nothing of
            what was learned since.
        surprises: measured over predicted seconds of each of these iterations.
        planning_s: seconds of each plan.
        planner_fallbacks: iterations that the safe policy planned in the planner's place, by the
            reason.
        failed_batches: batches that failed as a whole and ran in parts, by whether memory was
            short.
        plans_ahead: plans made while an iteration ran, by whether they were ``launched`` behind
            it at once, ``held`` when it had ended, or were ``discarded``.
        num_surplus_tokens: tokens that ran in vain, as their outputs had ended in the iteration
            before, which was not read yet.
        prefill_tokens, decode_tokens, draft_tokens: tokens of each kind that one iteration ran.
        speculation: counts of drafted and accepted tokens.
        profile_completeness: share of the measurements of a full profile of the device that were
            made, 0 to 1: the profile is rough until all were, and there is none at 0.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )
    slo_requests: dict[tuple[str, Outcome], int] = field(
        default_factory=lambda: {(CUSTOM, outcome): 0 for outcome in Outcome}
    )
    ttft_s: Histogram = field(default_factory=_of_requests)
    inter_token_s: Histogram = field(default_factory=_of_iterations)
    e2e_s: Histogram = field(default_factory=_of_requests)
    queue_s: Histogram = field(default_factory=_of_requests)
    prefill_s: Histogram = field(default_factory=_of_requests)
    decode_s: Histogram = field(default_factory=_of_requests)
    request_prompt_tokens: Histogram = field(default_factory=_of_tokens)
    request_generation_tokens: Histogram = field(default_factory=_of_tokens)
    iteration_s: Histogram = field(default_factory=_of_iterations)
    predicted_s: Histogram = field(default_factory=_of_iterations)
    profiled_s: Histogram = field(default_factory=_of_iterations)
    surprises: Histogram = field(default_factory=_of_surprises)
    planning_s: Histogram = field(default_factory=_of_iterations)
    plans_ahead: dict[str, int] = field(
        default_factory=lambda: {"launched": 0, "held": 0, "discarded": 0}
    )
    num_surplus_tokens: int = 0
    planner_fallbacks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    failed_batches: dict[str, int] = field(default_factory=lambda: {"error": 0, "out_of_memory": 0})
    prefill_tokens: Histogram = field(default_factory=_of_tokens)
    decode_tokens: Histogram = field(default_factory=_of_tokens)
    draft_tokens: Histogram = field(default_factory=_of_tokens)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    profile_completeness: float = 0.0

    def add_classes(self, names: Iterable[str]) -> None:
        """Count these SLO classes by name."""
        for name in names:
            for outcome in Outcome:
                self.slo_requests.setdefault((name, outcome), 0)

    def started(self, seq: Sequence, now: float) -> None:
        """Count that a sequence has left the queue for the first time."""
        self.queue_s.observe(now - seq.request.arrival_s)

    def delivered(self, seq: Sequence, num: int, last: float | None, now: float) -> None:
        """Count that so many new tokens have come.

        Args:
            last: when the tokens before them came; ``None`` for the first ones.
        """
        self.num_generation_tokens += num
        if last is not None:
            self.inter_token_s.observe(now - last)
            return
        self.ttft_s.observe(now - seq.request.arrival_s)
        self.prefill_s.observe(now - seq.events.get(RequestEvent.SCHEDULED, now))
        if seq.index == 0:
            self.num_prompt_tokens += seq.num_prompt_tokens

    def ended(self, seq: Sequence, report: SLOReport | None) -> tuple[str, Outcome] | None:
        """Count that a sequence has finished, for any reason.

        Returns:
            the key under which ``slo_requests`` counts it, if it does.
        """
        reason, now = seq.finish_reason, seq.events[RequestEvent.FINISHED]
        assert reason is not None, "a finished sequence has its reason"
        self.finished[reason] += 1
        if reason.is_own_end:
            self.e2e_s.observe(now - seq.request.arrival_s)
            first = seq.events.get(RequestEvent.FIRST_TOKEN, now)
            self.decode_s.observe(seq.events.get(RequestEvent.TOKENS, now) - first)
            self.request_prompt_tokens.observe(seq.num_prompt_tokens)
            self.request_generation_tokens.observe(seq.num_output_tokens)
        if report is None or seq.progress is None:
            return None
        # A client that leaves while all is in time says nothing of the SLO.
        if reason is FinishReason.ABORT and (report.attained or not seq.progress.is_broken(now)):
            return None
        key = (report.name, report.outcome)
        if key not in self.slo_requests:
            key = (CUSTOM, report.outcome)
        self.slo_requests[key] += 1
        return key

    def batch(self, batch: SequenceOf[Scheduled]) -> BatchTokens:
        """Count the tokens of a batch that is about to run; its prefills may be decodes after."""
        prefill = decode = drafted = 0
        # Of these, the tokens of best effort.
        spare_prefill = spare_decode = spare_drafted = 0
        for seq, num_tokens, proposal in batch:
            is_spare = seq.standing is Standing.BEST_EFFORT
            if not seq.is_decoding:
                prefill += num_tokens
                if is_spare:
                    spare_prefill += num_tokens
                continue
            num_drafted = 0 if proposal is None else len(proposal.token_ids)
            decode += num_tokens
            drafted += num_drafted
            if is_spare:
                spare_decode += num_tokens
                spare_drafted += num_drafted
        self.prefill_tokens.observe(prefill)
        self.decode_tokens.observe(decode)
        self.draft_tokens.observe(drafted)
        return BatchTokens(
            decode - spare_decode,
            drafted - spare_drafted,
            prefill - spare_prefill,
            spare_decode,
            spare_drafted,
            spare_prefill,
        )

    def iteration(self, plan: IterationPlan, model: PerfModel | None, measured_s: float) -> None:
        """Count an iteration that has run as planned, and how long it took."""
        self.iteration_s.observe(measured_s)
        if model is not None:
            self.profiled_s.observe(model.profiled(plan.shape))
        if plan.predicted_s:
            self.predicted_s.observe(plan.predicted_s)
            self.surprises.observe(measured_s / plan.predicted_s)

    def copy(self, **state: float) -> EngineStats:
        """Return all counts as they are, with the given fields replaced."""
        places = self.speculation.num_accepted_per_pos.copy()
        own: dict[str, Any] = {
            "speculation": replace(self.speculation, num_accepted_per_pos=places),
            **state,
        }
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (dict, Histogram)):
                own[one.name] = value.copy()
        return replace(self, **own)
