"""What was asked (`Request`) and its live state (`Sequence`). No torch, no clock.

A request asks for ``n`` outputs; each is a `Sequence` of its own, and sequences
are what planners schedule. A sequence's life, with the event on each edge::

    arrival ──QUEUED──► waiting ──SCHEDULED──► running ──FIRST_TOKEN──► running ──FINISHED──► finished
                           ▲                     │  ▲                      │
                           │                     │  └───── TOKENS ─────────┤
                           └───── PREEMPTED ─────┴─────────────────────────┘
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, cast

from minserve.sampling_params import SamplingParams
from minserve.slo.attainment import Progress
from minserve.slo.objectives import SLO, Standing, Targets
from minserve.slo.task_call import TaskCall
from minserve.slots import copy_slots

if TYPE_CHECKING:
    from minserve.engine.structures.guide import Guide

# Steps of priority, in either direction, that change the weight of a request's SLO.
MOST_STEPS = 10


class RequestEvent(Enum):
    """An edge of a sequence's life (drawn above)."""

    QUEUED = "queued"
    FIRST_START = "first_start"
    SCHEDULED = "scheduled"
    FIRST_TOKEN = "first_token"
    TOKENS = "tokens"
    PREEMPTED = "preempted"
    FINISHED = "finished"

    # Each event is one object. `Enum` would hash its name, in Python, for every token noted.
    __hash__ = object.__hash__


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a sequence ended; the values are OpenAI's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"

    @property
    def is_own_end(self) -> bool:
        """True where the output came to its end by itself, and was not cut off from outside."""
        return self in (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it was asked. Never changes.

    Attributes:
        request_id: unique among the requests in flight; chosen by the engine.
        prompt_token_ids: at least one token, each within the vocabulary.
        params: sampling settings, ``max_tokens`` already resolved to a number.
        seed: the seed in force (``params.seed`` or one that the engine drew).
        arrival_s: time of arrival on the engine's monotonic clock.
        priority: lower runs earlier, ties by arrival; and it weighs the SLO (`value`).
        cache_salt: requests share cached prefixes only with the same salt.
        stop_token_ids: every id that ends the output (the model's end-of-sequence
            ids unless ignored, and the request's own).
        bad_word_ids: the token sequences of ``params.bad_words``; none may be completed.
        slo: what latency was asked for; ``None`` asks for nothing.
        targets: the SLO in seconds on this device; set together with ``slo``.
        task: the call of a task that it is, or is a part of; ``None`` where the SLO names no task.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_s: float
    priority: int = 0
    cache_salt: str = ""
    stop_token_ids: frozenset[int] = frozenset()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    slo: SLO | None = None
    targets: Targets | None = None
    task: TaskCall | None = None

    def in_task(self, call: TaskCall) -> Request:
        """Return the request as a call of a task, which gives it deadlines."""
        assert self.targets is not None, "a task is part of an SLO"
        finish_s = min(self.targets.finish_s, call.finish_s)
        targets = replace(self.targets, finish_s=finish_s, aim_s=min(finish_s, call.aim_s))
        return replace(self, task=call, targets=targets)

    @property
    def max_tokens(self) -> int:
        """Most output tokens."""
        assert self.params.max_tokens is not None, "resolved when the request was made"
        return self.params.max_tokens

    @property
    def value(self) -> float:
        """Weight of the request in the planner's choice; 0 without an SLO.

        It is the SLO's own, twice as much for each step of priority below 0 and half as much for each
        above, up to `MOST_STEPS`; a call of a task counts for more towards the task's end.
        """
        if self.slo is None:
            return 0.0
        steps = max(-MOST_STEPS, min(MOST_STEPS, self.priority))
        value = math.ldexp(self.slo.value, -steps)
        return value if self.task is None else value * self.task.weight

    @property
    def refuses_delay(self) -> bool:
        """True if the request has an SLO and would rather be refused than be late."""
        return self.slo is not None and self.slo.refuses_delay


@dataclass(eq=False, slots=True)
class Sequence:
    """Live state of one output of a request.

    Written by the engine core's ``apply`` alone (and ``block_table`` by the block
    pool); planners only read it.

    Attributes:
        token_ids: prompt, then output so far.
        num_computed_tokens: tokens whose KV is in the cache.
        num_cached_tokens: of these, how many a prefix hit gave at the first start.
        num_draft_tokens, num_accepted_tokens: drafted so far, and of these those accepted.
        block_table: ids of the KV blocks, in token order. Set by the block pool.
        block_hashes: prefix digests of the full blocks so far. Set by the block pool.
        events: when each event last happened, except FIRST_START, the first time that it was
            SCHEDULED, and FIRST_TOKEN.
        progress: how the output stands against its targets; ``None`` without an SLO.
        standing: what the planner has promised; without an SLO always BEST_EFFORT.
        guide: keeps the output to its structure; ``None`` where it has none.
    """

    request: Request
    index: int = 0
    state: SequenceState = SequenceState.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    events: dict[RequestEvent, float] = field(default_factory=dict)
    seq_id: str = ""
    progress: Progress | None = None
    standing: Standing = Standing.BEST_EFFORT
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.request.targets is not None:
            self.progress = Progress(self.request.targets, self.request.arrival_s)
            self.standing = Standing.PENDING
        self.token_ids = list(self.request.prompt_token_ids)
        n = self.request.params.n
        self.seq_id = self.request.request_id + (f"/{self.index}" if n > 1 else "")

    @property
    def rank(self) -> tuple[int, float, str]:
        """Sort key: who goes first (lowest priority number, then earliest arrival)."""
        return (self.request.priority, self.request.arrival_s, self.seq_id)

    @property
    def slo_progress(self) -> Progress:
        """The `progress` of a sequence that is known to have an SLO.

        Raises:
            RuntimeError: for a sequence without an SLO, which is a mistake of the caller.
        """
        if self.progress is None:
            raise RuntimeError(f"{self!r} has no SLO, but is treated as one that has")
        return self.progress

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to run before the next one can be sampled; 1 for a plain decode."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """True where exactly the newest token, sampled before, remains to be computed."""
        # Asked several times per sequence and iteration, hence without other properties and calls.
        num_tokens = len(self.token_ids)
        return num_tokens - self.num_computed_tokens == 1 and num_tokens > len(
            self.request.prompt_token_ids
        )

    def is_decoding_behind(self, num_computed_tokens: int) -> bool:
        """`is_decoding` once so many tokens are computed: a sequence that was preempted may find
        all but its newest token in the prefix cache.
        """
        return self.num_tokens - num_computed_tokens == 1 and self.num_output_tokens > 0

    @property
    def has_begun(self) -> bool:
        """True once it runs or has a token; what waits without one can still be refused."""
        return self.state is not SequenceState.WAITING or self.num_output_tokens > 0

    def ahead(self, num_tokens: int, at: float) -> Sequence:
        """The sequence as it will be when so many more of its tokens have run, to plan with.

        Where nothing is left to run then, the next token is there too.

        Args:
            at: when that will be.

        Returns:
            a copy that shares its lists of blocks with the sequence. Its token ids can be
            counted but mean nothing.
        """
        twin = copy_slots(self)
        twin.num_computed_tokens += num_tokens
        if twin.num_uncomputed_tokens == 0:
            # A copy of the list would cost as much as planning does where contexts are long.
            twin.token_ids = cast("list[int]", range(self.num_tokens + 1))
            if self.progress is not None:
                twin.progress = self.progress.with_token(at)
        return twin

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id!r}, {self.state.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed_tokens})"
        )


def by_rank(seq: Sequence) -> tuple[int, float, str]:
    """The key for sorting sequences in rank order."""
    return seq.rank
