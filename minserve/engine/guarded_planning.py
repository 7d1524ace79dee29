"""`GuardedPlanning`: a planner whose mistakes cost no request anything.

Where a policy raises an error, takes too long, or makes a plan that cannot be carried out, a safe
policy plans that iteration. It promises nothing and gives nobody up; promises that were made before
stay made. The next iteration is the policy's own again. If it fails there too, it rests: after each
failure in a row for twice as many iterations, up to `LONGEST_REST`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from minserve.engine.time_limit import TimeLimit, TimeLimitError
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.request import Sequence

log = logging.getLogger(__name__)

# A plan takes milliseconds; one that took so many seconds will probably never be ready.
LONGEST_PLAN_S = 5.0
LONGEST_REST = 1024
# Failures nearer to each other than so many seconds are not all logged.
LOG_EVERY_S = 10.0
# Why an iteration was planned by the safe policy: the planner raised an error, took too long, made
# a plan that contradicts itself or the state, or rests.
REASONS = ("error", "hang", "invalid", "rest")


class GuardedPlanning:
    """Asks a planner, and the safe policy where that fails.

    Args:
        safe: the safe policy; ``None`` raises the planner's errors, as a simulation wants it.
        counts: how often the safe policy planned an iteration, by the reason; counted up here.

    Attributes:
        planner: the planner itself.
        time_limit: lets another thread interrupt a plan that takes too long.
    """

    def __init__(self, planner: Planner, safe: Planner | None, counts: dict[str, int]) -> None:
        self.planner = planner
        self._counts = counts
        self.time_limit = TimeLimit()
        self._safe = safe
        self._stands_in = False  # the newest plan is the safe policy's
        self._num_failures = 0  # in a row
        self._rest = 0
        self._logged_s = -LOG_EVERY_S

    def plan(self, view: PlannerView, now: float) -> IterationPlan:
        """Return the planner's plan, or the safe policy's."""
        self._stands_in = False
        if self._rest:
            self._rest -= 1
            return self._plan_safely(view, now, "rest")
        if self._safe is None:
            return self.planner.plan(view, now)
        try:
            with self.time_limit:
                return self.planner.plan(view, now)
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}", now, error)
            reason = "hang" if isinstance(error, TimeLimitError) else "error"
            return self._plan_safely(view, now, reason)

    def replace(self, view: PlannerView, now: float, why: str) -> IterationPlan | None:
        """Return a plan in place of the newest one, which cannot be carried out.

        ``None`` where nothing else is to be had.
        """
        if self._safe is None or self._stands_in:
            return None
        self._failed(why, now)
        return self._plan_safely(view, now, "invalid")

    def blame(self, why: str, now: float) -> bool:
        """Note that a part of the newest plan could not be carried out.

        Returns:
            True if the next plan will be the safe policy's, which may do better.
        """
        if self._safe is None or self._stands_in:
            return False
        self._failed(why, now)
        self._rest = max(self._rest, 1)
        return True

    def started(self, plan: IterationPlan) -> None:
        """Note that the newest plan is being carried out."""
        if not self._stands_in and not self._rest:
            self._num_failures = 0
        self._tell(self.planner.started, plan)

    def discarded(self) -> None:
        """As in `Planner`."""
        self._tell(self.planner.discarded)

    def reckon(self, plan: IterationPlan, view: PlannerView) -> None:
        """As in `Planner`."""
        self._tell(self.planner.reckon, plan, view)

    def observe(self, plan: IterationPlan, seconds: float) -> None:
        """As in `Planner`."""
        self._tell(self.planner.observe, plan, seconds)

    def finished(self, seq: Sequence) -> None:
        """As in `Planner`."""
        self._tell(self.planner.finished, seq)

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """As in `Planner`."""
        self._tell(self.planner.verified, seq, num_drafted, num_accepted)

    def _tell(self, what: Callable[..., None], *news: Any) -> None:
        """Tell the planner something; whatever comes of that, tokens must not be lost."""
        try:
            what(*news)
        except Exception as error:
            if self._safe is None:
                raise
            log.warning("the policy %s did not take news: %r", self.planner.name, error)

    def _plan_safely(self, view: PlannerView, now: float, reason: str) -> IterationPlan:
        assert self._safe is not None, "rest and failures are counted where there is one"
        self._counts[reason] += 1
        self._stands_in = True
        self._safe.model = self.planner.model
        return self._safe.plan(view, now)

    def _failed(self, why: str, now: float, error: Exception | None = None) -> None:
        assert self._safe is not None, "only then it is asked"
        self.discarded()
        self._num_failures += 1
        self._rest = min(2 ** (self._num_failures - 1), LONGEST_REST) - 1
        if now - self._logged_s < LOG_EVERY_S:
            return
        self._logged_s = now
        log.error(
            "the policy %s failed, %d times in a row now; %s plans %d iterations in its place: %s",
            self.planner.name,
            self._num_failures,
            self._safe.name,
            self._rest + 1,
            why,
            exc_info=error,
        )
