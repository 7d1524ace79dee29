"""`Activity`: what an engine has done lately, for people who look at it. Data only.

An engine keeps a little of it (`minserve.engine.journal`), and the page at ``/`` shows it. Times are
float seconds on the engine's own clock; another engine's clock says something else. No text and
no token is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from minserve.request import FinishReason, SequenceState
from minserve.slo.attainment import Outcome
from minserve.slo.objectives import Standing


class Cursor(NamedTuple):
    """How much of an engine's activity somebody has seen.

    Attributes:
        source: names the engine's process, since the next process counts anew.
        tick: number of the newest change that was seen.
    """

    source: str
    tick: int


class BatchTokens(NamedTuple):
    """What a batch holds.

    Attributes:
        decode, draft, prefill: tokens of decodes, drafted tokens to verify, and prefill tokens of
            sequences that are not best effort.
        best_effort_decode, best_effort_draft, best_effort_prefill: the same of best effort.
    """

    decode: int
    draft: int
    prefill: int
    best_effort_decode: int
    best_effort_draft: int
    best_effort_prefill: int


NO_TOKENS = BatchTokens(0, 0, 0, 0, 0, 0)


class IterationRecord(NamedTuple):
    """One iteration.

    Attributes:
        began_s, seconds: when it began, and its length with the planning that it waited for.
        predicted_s: its length as the planner predicted it; ``None`` without a performance model.
        num_seqs: sequences in its batch.
    """

    began_s: float
    seconds: float
    predicted_s: float | None
    num_seqs: int
    tokens: BatchTokens


class Mark(NamedTuple):
    """A part of a lane: one prefill chunk, tokens that came at once, or several of these.

    What ran while nobody looked is one mark of prefill and one of output.

    Attributes:
        is_prefill: true for prefill tokens, false for tokens of the output.
        from_s, to_s: of a chunk, when its iteration began and ended. Of output tokens, when the first
            and the last of them came.
        num_tokens: how many tokens.
        slack_s: how long before its deadline the one came that came closest to it; negative where it
            came late, ``None`` where none of them had a deadline.
    """

    is_prefill: bool
    from_s: float
    to_s: float
    num_tokens: int
    slack_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The life of one output.

    Attributes:
        seq_id: its request's id, which the engine chose, and its index where there are several.
        slo: name of its SLO class; ``None`` without an SLO.
        arrival_s, started_s, first_token_s, ended_s: when; ``None`` where it has not happened.
        preempted_s: when it gave up its blocks, the newest few times.
        ttft_due_s, finish_due_s: deadlines of the first and the last token; ``None`` where none is
            promised.
        tpot_s: pace of the present stage in seconds per token; ``None`` where none is promised.
        num_prompt_tokens, num_cached_tokens, num_output_tokens: so far.
        finish_reason, outcome: how it ended; the outcome only with an SLO.
        first_mark: number of earlier marks, which have not changed and are left out.
        marks: the marks from there on, in order of time.
    """

    seq_id: str
    slo: str | None
    state: SequenceState
    standing: Standing
    arrival_s: float
    started_s: float | None
    first_token_s: float | None
    ended_s: float | None
    preempted_s: tuple[float, ...]
    ttft_due_s: float | None
    finish_due_s: float | None
    tpot_s: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None
    outcome: Outcome | None
    first_mark: int
    marks: tuple[Mark, ...]


class ClassEnds(NamedTuple):
    """The outputs of one SLO class that ended within a few seconds (`minserve.engine.journal.SPAN_S`).

    Attributes:
        since_s: when these seconds began.
        num_ended, num_attained: outputs that ended, and of these those that attained their SLO, as
            `minserve.engine.stats` counts them.
    """

    since_s: float
    name: str
    num_ended: int
    num_attained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What has changed since a `Cursor`, or all that is kept.

    Attributes:
        source, tick: the cursor for the next look.
        is_whole: true where it is all that is kept, so that what was told before counts no more.
        now_s: the time of this look.
        waiting, running: sequences now, by standing.
        iterations: the new ones, oldest first.
        lanes: those under way, and those that ended since. Those under way are always told: what is
            missing among them is gone.
        ends: changed counts, each in place of the one of its class and time before it.
    """

    source: str
    tick: int
    is_whole: bool
    now_s: float
    waiting: dict[Standing, int]
    running: dict[Standing, int]
    iterations: tuple[IterationRecord, ...]
    lanes: tuple[Lane, ...]
    ends: tuple[ClassEnds, ...]
