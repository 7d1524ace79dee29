"""`IterationPlan`: the one thing a planner returns, and the view of the engine that it plans from."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from minserve.errors import SLOUnattainableError
from minserve.planner.predict.perf_model import BatchShape
from minserve.request import Sequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is refused, and when the same request would be admitted.

    Attributes:
        reason: what there is too little of: ``compute``, ``memory``, or ``device`` where
            the SLO could not even be kept on an idle one.
        retry_after_s: seconds from now, by the planner's prediction.
    """

    reason: str
    retry_after_s: float

    def error(self) -> SLOUnattainableError:
        """What the client is told."""
        return SLOUnattainableError(
            f"the SLO cannot be kept now (too little {self.reason}); "
            f"try again in {self.retry_after_s:.1f} s",
            reason=self.reason,
            retry_after_s=self.retry_after_s,
        )


@dataclass(slots=True, kw_only=True)
class IterationPlan:
    """What one iteration runs. Data only; the engine core carries it out.

    Attributes:
        num_scheduled_tokens: per sequence id, tokens to run: a prefill chunk's
            length, or 1 + the speculation length for a decode.
        speculation: per decoding sequence, how many of these are to be drafted; none of
            the others is.
        catch_up: per decoding sequence, how many tokens the draft model runs of those that
            it lacks, without drafting yet.
        start: waiting sequences that start (or resume) in this iteration.
        preempt: running sequences that give up their blocks and wait again.
        admit: sequences whose SLO is promised from now on.
        relegate: sequences whose SLO is given up: they are served as best effort.
        reject: sequences that end here, as they asked, since their SLO cannot be kept.
        declined: waiting sequences that are promised nothing for now, though there is time:
            where there is another replica, it may have room.
        shape: what of this batch decides its time.
        predicted_s: predicted seconds of the iteration; ``None`` without a performance
            model.
        start_by_s: on the engine's clock, until when the iteration may begin and still end
            in time; later it is better planned anew.
        best_effort_s: of the predicted seconds, those that go to best effort.
        best_effort_waits: True where there is best effort that this batch has no room for.
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
        """The plan without all other sequences. Its shape is still to be reckoned."""

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
    """What the prefix index holds of a waiting sequence.

    Attributes:
        num_tokens: computed tokens that a start would reuse (whole blocks).
        num_idle_blocks: of these blocks, how many nobody uses now: taking them
            makes as many fewer free.
    """

    num_tokens: int = 0
    num_idle_blocks: int = 0


class MemoryView(Protocol):
    """What a planner may know of the block pool."""

    @property
    def block_size(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now (evictable cached ones included)."""

    def may_hit(self, seq: Sequence) -> bool:
        """True where a sequence begins with the blocks that are cached of its tokens."""

    def cached_prefix(self, seq: Sequence) -> CachedPrefix:
        """The longest cached prefix of ``seq``, at most all its tokens but the last."""

    def num_releasable_blocks(self, seq: Sequence) -> int:
        """Blocks that become free when ``seq`` is preempted (those nobody shares)."""


class SpeculationView(Protocol):
    """What a planner may know of who drafts."""

    @property
    def max_tokens(self) -> int:
        """Most tokens drafted for a sequence in one iteration."""

    def limit(self, seq: Sequence) -> int:
        """How many tokens can be drafted for a decoding sequence now."""

    def lag(self, seq: Sequence) -> int:
        """Tokens that the draft model lacks of a sequence, before it can draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerView:
    """The engine's state, read only.

    Attributes:
        waiting, running: sequences in rank order (priority, then arrival).
        token_budget: most tokens in one iteration.
        max_num_seqs: most sequences in one iteration.
        speculation: who drafts; ``None`` where nobody does.
    """

    waiting: SequenceOf[Sequence]
    running: SequenceOf[Sequence]
    memory: MemoryView
    token_budget: int
    max_num_seqs: int
    speculation: SpeculationView | None = None


def shared_blocks(seq: Sequence, memory: MemoryView) -> int:
    """Blocks of its prompt that an output shares with those of the same request that began
    before it; 0 where it has no siblings.
    """
    if seq.request.params.n == 1 or not memory.may_hit(seq):
        return 0
    return (seq.num_prompt_tokens - 1) // memory.block_size
