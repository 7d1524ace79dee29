"""The claims of best effort: its share of the time, and memory that promises leave.

Both classes remember something from one plan to the next; the planner tells them what became of a
plan.
"""

from __future__ import annotations

import math

from minserve.planner.plan import IterationPlan

# How long it is remembered that promises held much memory. Longer than outputs take: best
# effort that starts in a lull should end before the next rush.
MEMORY_FADE_S = 60.0
# The most of the pool that best effort leaves free beside that: for a larger rush than those
# before it, and for prefixes that stay cached until a request asks for them again.
SPARE_MEMORY = 1 / 3


class BestEffortAccount:
    """Seconds of the device's time that best effort is owed.

    Args:
        share: the least share of the device's time that it gets while it waits, in [0, 1).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        # Without the plan under way.
        self._owed_s = 0.0
        self._under_way: IterationPlan | None = None

    @property
    def owed_s(self) -> float:
        """Seconds that are owed once the plan under way, if there is one, has been carried out."""
        if self._under_way is None:
            return self._owed_s
        return self._after(self._under_way, self._under_way.predicted_s or 0.0)

    def started(self, plan: IterationPlan) -> None:
        """Note that a plan is being carried out."""
        self._under_way = plan

    def observe(self, plan: IterationPlan, seconds: float) -> None:
        """Note that a plan was carried out in so many seconds."""
        self._owed_s = self._after(plan, seconds)
        # While it ended, the next one may have started already.
        if self._under_way is plan:
            self._under_way = None

    def _after(self, plan: IterationPlan, seconds: float) -> float:
        more = self.share * seconds if plan.best_effort_waits else 0.0
        return max(0.0, self._owed_s + more - plan.best_effort_s)


class PromisedMemory:
    """The most blocks that sequences under a promise held lately.

    Attributes:
        most: number of blocks; it fades by half in 0.7 `MEMORY_FADE_S`.
    """

    def __init__(self) -> None:
        self.most = 0.0
        self._seen_s = 0.0

    def see(self, num_blocks: int, now: float) -> None:
        """Note how many blocks are held now."""
        faded = self.most * math.exp(-max(0.0, now - self._seen_s) / MEMORY_FADE_S)
        self.most, self._seen_s = max(float(num_blocks), faded), now

    def spare(self, num_blocks: int) -> float:
        """Return how many blocks of a pool sequences without a promise may hold.

        If little is promised, little is kept free.
        """
        return num_blocks - self.most - min(self.most, SPARE_MEMORY * num_blocks)
