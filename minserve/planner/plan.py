"""`IterationPlan`, which a planner returns, and `PlannerView`, the engine's state that it sees."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from minserve.errors import SLOUnattainableError
from minserve.planner.predict.eager import DraftPasses
from minserve.planner.predict.perf_model import BatchShape
from minserve.request import Sequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason why a request is refused, and the time after which it would be admitted.

    Attributes:
        reason: the resource that is short: ``compute``, ``memory``, or ``device`` if even an idle
            device could not keep the SLO.
        retry_after_s: seconds from now, by the planner's prediction; infinite for ``device``.
    """

    reason: str
    retry_after_s: float

    def error(self) -> SLOUnattainableError:
        """Return the error that the client gets."""
        problem = (
            "the SLO cannot be kept here, not even by the idle device; "
            "allow more time, or set on_unattainable to best_effort"
            if math.isinf(self.retry_after_s)
            else f"the SLO cannot be kept now (too little {self.reason}); "
            f"try again in {self.retry_after_s:.1f} s"
        )
        return SLOUnattainableError(
            problem,
            reason=self.reason,
            retry_after_s=self.retry_after_s,
        )


@dataclass(slots=True, kw_only=True)
class IterationPlan:
    """The work of one iteration. It holds data only; the engine core carries it out.

    Attributes:
        num_scheduled_tokens: number of tokens to run by sequence id: the length of a prefill chunk,
            or 1 + the speculation length for a decode.
        speculation: number of these tokens that are to be drafted, by the id of each decoding
            sequence that drafts.
        catch_up: number of tokens that the draft model lacks and now runs without drafting, by the
            id of a decoding sequence.
        start: waiting sequences that start (or resume) in this iteration.
        preempt: running sequences that give up their blocks and wait again.
        admit: sequences whose SLO is promised from now on.
        relegate: sequences whose SLO is given up: they are served as best effort.
        reject: sequences that end here, as they asked, since their SLO cannot be kept.
        declined: waiting sequences that are promised nothing for now, although there is time.
            Another replica, if there is one, may have room.
        shape: the numbers of this batch that decide its time.
        predicted_s: predicted seconds of the iteration; ``None`` without a performance model.
        start_by_s: the latest time on the engine's clock at which the iteration may begin and still
            end in time; later it is better planned anew.
        best_effort_s: the part of the predicted seconds that goes to best effort.
        best_effort_waits: True if this batch has no room for some of best effort.
    """

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    speculation: dict[str, int] = field(default_factory=dict)
    catch_up: dict[str, int] = field(default_factory=dict)
    start: list[str] = field(default_factory=list)
    preempt: list[str] = field(default_factory=list)
    admit: list[str] = field(default_factory=list)
    relegate: list[str] = field(default_factory=list)
    reject: dict[str, Refusal] = field(default_factory=dict)
    declined: list[str] = field(default_factory=list)
    shape: BatchShape = field(default_factory=BatchShape)
    predicted_s: float | None = None
    start_by_s: float = math.inf
    best_effort_s: float = 0.0
    best_effort_waits: bool = False

    @property
    def total_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())

    def only(self, seq_ids: Container[str]) -> IterationPlan:
        """Return the plan without all other sequences. Its shape is still to be reckoned."""

        def of(part: Mapping[str, T]) -> dict[str, T]:
            return {seq_id: value for seq_id, value in part.items() if seq_id in seq_ids}

        def among(part: SequenceOf[str]) -> list[str]:
            return [seq_id for seq_id in part if seq_id in seq_ids]

        return replace(
            self,
            num_scheduled_tokens=of(self.num_scheduled_tokens),
            speculation=of(self.speculation),
            catch_up=of(self.catch_up),
            start=among(self.start),
            preempt=among(self.preempt),
            admit=among(self.admit),
            relegate=among(self.relegate),
            reject=of(self.reject),
            declined=among(self.declined),
        )


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The part of a waiting sequence that the prefix index holds.

    Attributes:
        num_tokens: number of computed tokens that a start would reuse (whole blocks).
        num_idle_blocks: number of these blocks that no sequence uses now. A start takes them out of
            the free blocks.
    """

    num_tokens: int = 0
    num_idle_blocks: int = 0


class MemoryView(Protocol):
    """The part of the block pool that a planner may see."""

    @property
    def block_size(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that can be given out now; cached blocks that can be evicted count."""

    def may_hit(self, seq: Sequence) -> bool:
        """Return True if a sequence may begin with cached blocks of its tokens."""

    def cached_prefix(self, seq: Sequence) -> CachedPrefix:
        """Return the longest cached prefix of ``seq``, at most all its tokens but the last."""

    def num_releasable_blocks(self, seq: Sequence) -> int:
        """Return how many blocks become free when ``seq`` is preempted: those that it does not
        share.
        """


class SpeculationView(Protocol):
    """The part of a proposer that a planner may see."""

    @property
    def max_tokens(self) -> int:
        """The most tokens that are drafted for a sequence in one iteration."""

    @property
    def passes(self) -> DraftPasses:
        """Which passes of the draft model are CUDA graphs."""

    def limit(self, seq: Sequence) -> int:
        """Return how many tokens can be drafted for a decoding sequence now."""

    def lag(self, seq: Sequence) -> int:
        """Return how many tokens of a sequence the draft model still has to run before it can
        draft.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerView:
    """The engine's state, read only.

    Attributes:
        waiting, running: sequences in rank order (priority, then arrival).
        memory: the block pool.
        token_budget: the most tokens of one iteration.
        max_num_seqs: the most sequences of one iteration.
        speculation: the proposer; ``None`` if no tokens are drafted.
    """

    waiting: SequenceOf[Sequence]
    running: SequenceOf[Sequence]
    memory: MemoryView
    token_budget: int
    max_num_seqs: int
    speculation: SpeculationView | None = None


def shared_blocks(seq: Sequence, memory: MemoryView) -> int:
    """Return how many blocks of its prompt an output shares with outputs of the same request that
    began before it; 0 if it shares none.
    """
    if seq.request.params.n == 1 or not memory.may_hit(seq):
        return 0
    return (seq.num_prompt_tokens - 1) // memory.block_size
