"""`LaneLog`: one output's life under way, in a bounded number of marks."""

from __future__ import annotations

import math

from minserve.activity import Lane, Mark
from minserve.request import RequestEvent, Sequence
from minserve.slo.attainment import Outcome

# The most marks of a lane. Beyond it neighbours are joined, so that a long output has coarser ones.
MAX_MARKS = 96
# The most times of preemptions that are kept.
MAX_PREEMPTIONS = 8


class LaneLog:
    """Takes marks as they come.

    Args:
        tick: of what it has done before.
        now: the time, on the clock of its events.

    Attributes:
        tick: number of its newest change.
        is_live: true until its output has ended.
    """

    __slots__ = (
        "_ended",
        "_marks",
        "_num_preemptions",
        "_outcome",
        "_preempted",
        "_seq",
        "_spread_s",
        "_started_s",
        "_ticks",
        "tick",
    )

    def __init__(self, seq: Sequence, tick: int, now: float) -> None:
        self.tick = tick
        self._seq = seq
        self._ended: Lane | None = None
        self._outcome: Outcome | None = None
        self._started_s = seq.events.get(RequestEvent.SCHEDULED)
        self._num_preemptions = 0
        self._preempted: list[float] = []
        self._marks = _past_marks(seq, now)
        self._ticks = [tick] * len(self._marks)  # of each mark's newest change; they rise
        # Marks of one kind within so many seconds are joined.
        self._spread_s = 0.0

    @property
    def is_live(self) -> bool:
        return self._ended is None

    def add(self, tick: int, mark: Mark) -> None:
        """Add a mark; joined to the newest one where both are of one kind and close together."""
        self.tick = tick
        marks, ticks = self._marks, self._ticks
        if self._spread_s and marks:
            last = marks[-1]
            if last.is_prefill is mark.is_prefill and mark.to_s - last.from_s < self._spread_s:
                marks[-1], ticks[-1] = _joined(last, mark), tick
                return
        marks.append(mark)
        ticks.append(tick)
        if len(marks) > MAX_MARKS:
            self._coarsen(tick)

    def end(self, tick: int, outcome: Outcome | None) -> None:
        """Note how the output ended; its last marks may still come."""
        self.tick, self._outcome = tick, outcome
        self._ended = self._told(0)
        # Of a sequence that has ended nothing is kept alive: its tokens may take megabytes.
        del self._seq

    def since(self, tick: int) -> Lane:
        """Return the output's life, with the marks that changed after a tick."""
        first = len(self._ticks)
        while first and self._ticks[first - 1] > tick:
            first -= 1
        if self._ended is None:
            return self._told(first)
        return _with_marks(self._ended, first, tuple(self._marks[first:]))

    def _told(self, first: int) -> Lane:
        seq = self._seq
        self._note_preemptions()
        events, progress = seq.events, seq.progress
        started_s = self._started_s
        if started_s is None:
            started_s = events.get(RequestEvent.SCHEDULED)
        return Lane(
            seq_id=seq.seq_id,
            slo=None if seq.request.slo is None else seq.request.slo.name,
            state=seq.state,
            standing=seq.standing,
            arrival_s=seq.request.arrival_s,
            started_s=started_s,
            first_token_s=events.get(RequestEvent.FIRST_TOKEN),
            ended_s=events.get(RequestEvent.FINISHED),
            preempted_s=tuple(self._preempted),
            ttft_due_s=(
                None if progress is None else _finite(progress.arrival_s + progress.targets.ttft_s)
            ),
            finish_due_s=None if progress is None else _finite(progress.finish_by_s),
            tpot_s=None if progress is None else _finite(progress.tpot_s),
            num_prompt_tokens=seq.num_prompt_tokens,
            num_cached_tokens=seq.num_cached_tokens,
            num_output_tokens=seq.num_output_tokens,
            finish_reason=seq.finish_reason,
            outcome=self._outcome,
            first_mark=first,
            marks=tuple(self._marks[first:]),
        )

    def _note_preemptions(self) -> None:
        """Note the newest preemption. Those between two looks count as one."""
        seq = self._seq
        if seq.num_preemptions > self._num_preemptions:
            self._num_preemptions = seq.num_preemptions
            # An output that began on another replica counts as preempted, but was not here.
            if (at := seq.events.get(RequestEvent.PREEMPTED)) is not None:
                self._preempted = [*self._preempted, at][-MAX_PREEMPTIONS:]

    def _coarsen(self, tick: int) -> None:
        """Join neighbours of one kind, and all that come as close together from now on."""
        marks = self._marks
        span_s = marks[-1].to_s - marks[0].from_s
        self._spread_s = max(2.0 * self._spread_s, 2.0 * span_s / MAX_MARKS)
        coarse = [marks[0]]
        for mark in marks[1:]:
            last = coarse[-1]
            if last.is_prefill is mark.is_prefill and mark.to_s - last.from_s < self._spread_s:
                coarse[-1] = _joined(last, mark)
            else:
                coarse.append(mark)
        # Where preemptions alternate with tokens, nothing can be joined.
        self._marks = coarse[-MAX_MARKS:]
        self._ticks = [tick] * len(self._marks)


def _past_marks(seq: Sequence, now: float) -> list[Mark]:
    """Return what a sequence has done so far: at most one mark of prefill, and one of output."""
    events, marks = seq.events, []
    started_s, first_s = events.get(RequestEvent.SCHEDULED), events.get(RequestEvent.FIRST_TOKEN)
    until_s = now if first_s is None else first_s
    computed = min(seq.num_prompt_tokens, seq.num_computed_tokens)
    # Once it was preempted, it is not known any more when it first started.
    if started_s is not None and started_s < until_s and (first_s is not None or computed):
        num = seq.num_prompt_tokens if first_s is not None else computed
        if num := num - seq.num_cached_tokens:
            marks.append(Mark(True, started_s, until_s, num, None))
    if first_s is not None:
        last_s, slack_s, progress = events[RequestEvent.TOKENS], None, seq.progress
        if progress is not None:
            due_s = progress.arrival_s + progress.targets.ttft_s
            worst_s = progress.worst_token_lateness_s
            pace_slack_s = math.inf if worst_s is None else -worst_s
            slack_s = _finite(min(due_s - first_s, pace_slack_s, progress.finish_by_s - last_s))
        marks.append(Mark(False, first_s, last_s, seq.num_output_tokens, slack_s))
    return marks


def _joined(one: Mark, other: Mark) -> Mark:
    slacks = [mark.slack_s for mark in (one, other) if mark.slack_s is not None]
    return Mark(
        one.is_prefill,
        one.from_s,
        other.to_s,
        one.num_tokens + other.num_tokens,
        min(slacks, default=None),
    )


def _with_marks(lane: Lane, first: int, marks: tuple[Mark, ...]) -> Lane:
    twin = {name: getattr(lane, name) for name in Lane.__slots__}
    return Lane(**{**twin, "first_mark": first, "marks": marks})


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
