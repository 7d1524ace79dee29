"""`Planner`: the interface of every scheduling policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from minserve.errors import ConfigError
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.predict.eager import MixedLimit, is_eager
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """The settings that a planner is made with.

    Attributes:
        model: the performance model of the device; it may be set later (``planner.model``). A
            policy that promises SLOs promises nothing without it.
        chunked_prefill: False to run whole prompts, which not every policy can do.
        lengths: guesses output lengths, for the policies that promise SLOs; ``None`` learns them.
        best_effort_share: the least share of the device's time that best effort gets while promises
            are kept, in [0, 1).
    """

    model: PerfModel | None = None
    chunked_prefill: bool = True
    lengths: LengthEstimator | None = None
    best_effort_share: float = 0.05


class Planner(ABC):
    """The base of every policy: it decides what the next iteration runs. It never changes a
    sequence.

    ``plan`` does what all policies share; a policy writes ``_plan``.

    Args:
        model: the performance model of the device; with it every policy predicts its iterations.

    Attributes:
        name: the name of the policy.
        promises: True if the policy promises SLOs.
        token_budget: the most tokens of an iteration, if the user asks for no other number.
        num_plans: number of plans made since the start.
        num_preemptions, num_starts: number of sequences that were preempted, and that were started,
            by the plans carried out.
    """

    name: ClassVar[str]
    promises: ClassVar[bool] = False
    token_budget: ClassVar[int] = 2048

    def __init__(self, model: PerfModel | None = None) -> None:
        self.model = model
        self.num_plans = 0
        self.num_preemptions = 0
        self.num_starts = 0

    @classmethod
    def create(cls, settings: PlannerSettings) -> Planner:
        """Return a planner with these settings; a policy takes the settings that it knows.

        Raises:
            ConfigError: for a setting that the policy cannot honour.
        """
        cls.check_chunks(settings)
        return cls(settings.model)

    @classmethod
    def check_chunks(cls, settings: PlannerSettings) -> None:
        """Raise `ConfigError` if prefills must not be chunked: most policies always chunk them."""
        if not settings.chunked_prefill:
            raise ConfigError(
                f"{cls.name} always chunks prefills; use --policy fcfs without chunking"
            )

    def plan(self, view: PlannerView, now: float) -> IterationPlan:
        """Plan one iteration; then either `started` or `discarded` says what became of the plan.

        The plan may be made while the plan before it still runs.

        Args:
            view: the engine's state when the iteration begins.
            now: the time at which it begins, in seconds on the engine's monotonic clock.
        """
        plan = self._plan(view, now)
        self.num_plans += 1
        if not plan.shape.tokens:
            self.reckon(plan, view)
        elif self.model is not None:
            plan.predicted_s = self.model.predict(plan.shape)
        return plan

    def reckon(self, plan: IterationPlan, view: PlannerView) -> None:
        """Set the shape and the predicted time of a plan from the tokens that it schedules."""
        if self.model is not None and plan.num_scheduled_tokens:
            plan.shape = _shape(view, plan, self.model.mixed)
            plan.predicted_s = self.model.predict(plan.shape)

    def started(self, plan: IterationPlan) -> None:
        """Note that a plan is being carried out."""
        self.num_preemptions += len(plan.preempt)
        self.num_starts += len(plan.start)

    def discarded(self) -> None:  # noqa: B027 - most policies keep nothing between two plans
        """Forget what the newest plan decided, because it will not be carried out."""

    def observe(self, plan: IterationPlan, seconds: float) -> None:
        """Learn from the seconds that the iteration of a plan took."""
        if self.model is not None:
            self.model.observe(plan.shape, seconds)

    def finished(self, seq: Sequence) -> None:  # noqa: B027 - most policies need not know
        """Learn from an output that came to its own end."""

    def verified(  # noqa: B027 - most policies need not know
        self, seq: Sequence, num_drafted: int, num_accepted: int
    ) -> None:
        """Learn how many tokens were drafted for a decode, perhaps none, and how many were
        accepted.
        """

    @abstractmethod
    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        """Return the policy's decision."""


def _shape(view: PlannerView, plan: IterationPlan, mixed: MixedLimit) -> BatchShape:
    """Return the shape of a plan's batch. A sequence that starts begins behind its cached prefix:
    those tokens are computed already.
    """
    scheduled, chunks, num_decodes = plan.num_scheduled_tokens, [], 0
    for seq in view.running:
        num_tokens = scheduled.get(seq.seq_id)
        if num_tokens is not None:
            chunks.append((seq.num_computed_tokens, num_tokens))
            num_decodes += seq.is_decoding
    if plan.start:
        starting = set(plan.start)
        for seq in view.waiting:
            if seq.seq_id in starting:
                cached = view.memory.cached_prefix(seq).num_tokens
                chunks.append((cached, scheduled[seq.seq_id]))
                num_decodes += seq.is_decoding_behind(cached)
    num_tokens = sum(num for _, num in chunks)
    eager = is_eager(len(chunks), num_decodes, num_tokens, mixed)
    shape = BatchShape.of(chunks, eager=eager)
    drafter = view.speculation
    if drafter is None or not (plan.speculation or plan.catch_up):
        return shape
    lags = [drafter.lag(s) for s in view.running if s.seq_id in plan.speculation]
    lengths = [*(lag + 1 for lag in lags), *plan.catch_up.values()]
    return replace(
        shape,
        draft_steps=max(plan.speculation.values(), default=1),
        draft_tokens=sum(plan.speculation.values()) + sum(lags) + sum(plan.catch_up.values()),
        draft_eager=int(drafter.passes.is_eager(lengths)),
    )
