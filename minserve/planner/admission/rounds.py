"""`AdmissionRounds`: when a round of admission is due, and what the newest one decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from minserve.planner.admission.review import ReviewResult
from minserve.planner.batching.draft_lengths import NO_DRAFTS, DraftsForPrefills
from minserve.planner.plan import MemoryView, PlannerView
from minserve.planner.predict.pacing import Paces
from minserve.request import Sequence

REVIEW_EVERY_S = 0.1
# Where drafts do not pay, they are not weighed again for so many iterations of the same
# sequences: for a tiny model weighing them costs as much as they could bring.
REST = 16


@dataclass(slots=True)
class _LastRound:
    """The decisions of the newest round, which hold until the next one.

    Attributes:
        chosen: ids of the sequences that are served, in the round's order.
        drafts: the worth of drafting while prefills wait.
        paces: what deadlines of whole outputs ask for.
        seen: ids of all sequences that the round knew.
        held_s: seconds on the engine's clock at which it was held.
        rest: number of iterations for which drafts are not weighed; below 0 they are.
    """

    chosen: dict[str, None] = field(default_factory=dict)
    drafts: DraftsForPrefills = NO_DRAFTS
    paces: Paces = field(default_factory=Paces)
    seen: list[str] = field(default_factory=list)
    held_s: float = -math.inf
    rest: int = 0


class AdmissionRounds:
    """Remembers the newest round of admission, and the one before it.

    A round is due when a sequence comes or goes, and every `REVIEW_EVERY_S` seconds. A plan that
    is discarded takes its round with it: the one before counts again.
    """

    def __init__(self) -> None:
        self._last = self._before = _LastRound()
        self._cached: dict[str, int] = {}

    @property
    def chosen(self) -> dict[str, None]:
        """Ids of the sequences that the newest round serves."""
        return self._last.chosen

    @property
    def drafts(self) -> DraftsForPrefills:
        """The worth of drafting while prefills wait, by the newest round."""
        return self._last.drafts

    @property
    def paces(self) -> Paces:
        """What deadlines of whole outputs ask for, by the newest round."""
        return self._last.paces

    def begin_plan(self) -> None:
        """Prepare for a plan, which may hold a round."""
        self._before, self._last = self._last, replace(self._last)

    def discard(self) -> None:
        """Take the newest plan's round back, because the plan will not be carried out."""
        self._last = self._before

    def newcomers(self, view: PlannerView, now: float) -> set[str] | None:
        """Return the ids of the sequences that the newest round did not know; ``None`` if no round
        is due.
        """
        ids = [seq.seq_id for seq in view.waiting]
        ids += [seq.seq_id for seq in view.running]
        last = self._last
        if ids == last.seen and now - last.held_s < REVIEW_EVERY_S:
            return None
        for seq_id in self._cached.keys() - ids:
            del self._cached[seq_id]
        new = set(ids).difference(last.seen)
        if ids != last.seen:
            last.rest = 0
        last.seen, last.held_s = ids, now
        return new

    @property
    def seen(self) -> list[str]:
        """Ids of all sequences that the newest round knew."""
        return self._last.seen

    def weighs_drafts(self) -> bool:
        """Return True unless drafts rest in this iteration; to be asked once for each plan."""
        self._last.rest -= 1
        return self._last.rest < 0

    def rest_from_drafts(self) -> None:
        """Let drafts rest for a while, because they did not pay."""
        self._last.rest = REST

    def decided(self, result: ReviewResult) -> None:
        """Keep what a round decided."""
        last = self._last
        last.chosen, last.drafts, last.paces = result.chosen, result.drafts, result.paces

    def cached_tokens(self, seq: Sequence, memory: MemoryView) -> int:
        """Return how many tokens of a waiting sequence the prefix index holds.

        It is looked up once per wait, because that costs hashing the prompt.
        """
        if seq.seq_id not in self._cached:
            self._cached[seq.seq_id] = memory.cached_prefix(seq).num_tokens
        return self._cached[seq.seq_id]
