"""The engine core's plan and apply without a model, on a virtual clock.

Every sampled token is random, and an iteration takes what a performance model says.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from minserve.engine.block_pool import BlockPool
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.predict.eager import is_eager
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Request, Sequence, SequenceState
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, Standing


def make_sequence(
    name: str,
    prompt: list[int],
    output: int,
    arrival: float = 0.0,
    priority: int = 0,
    slo: SLO | None = None,
    model: PerfModel | None = None,
    max_tokens: int | None = None,
) -> Sequence:
    """A sequence that will have ``output`` tokens (and says so, unless ``max_tokens`` says more)."""
    targets = None
    if slo is not None:
        zero = (0.0, 0.0)
        if model is not None:
            zero = (model.zero_load_prefill_s(len(prompt)), model.zero_load_decode_s(len(prompt)))
        targets = slo.resolve(*zero)
    request = Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens or output),
        seed=output,
        arrival_s=arrival,
        priority=priority,
        slo=slo,
        targets=targets,
    )
    return Sequence(request)


class Replay:
    """Runs a planner's plans against a real block pool.

    Args:
        device: how long iterations take; without it time stands still.
        noise: factor on each iteration's time.

    Attributes:
        now: the virtual clock.
        rejected: sequences that the planner refused.
    """

    def __init__(
        self,
        planner: Planner,
        pool: BlockPool,
        budget: int,
        max_num_seqs: int,
        *,
        device: PerfModel | None = None,
        noise: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.planner, self.pool = planner, pool
        self.budget, self.max_num_seqs = budget, max_num_seqs
        self.device, self.noise = device, noise
        self.now = 0.0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.rejected: list[Sequence] = []
        self.rng = random.Random(0)

    def view(self) -> PlannerView:
        return PlannerView(
            waiting=sorted(self.waiting, key=lambda s: s.rank),
            running=sorted(self.running, key=lambda s: s.rank),
            memory=self.pool,
            token_budget=self.budget,
            max_num_seqs=self.max_num_seqs,
        )

    def plan(self) -> IterationPlan:
        return self.planner.plan(self.view(), now=self.now)

    def launched(self, plan: IterationPlan, by_id: dict[str, Sequence]) -> None:
        """The batch of a plan is about to run."""

    def step(self) -> IterationPlan:
        plan = self.plan()
        by_id = {s.seq_id: s for s in self.waiting + self.running}
        assert len(plan.num_scheduled_tokens) <= self.max_num_seqs
        self._settle(plan, by_id)
        self._start(plan, by_id)
        self.planner.started(plan)
        self.launched(plan, by_id)
        seconds = 0.0
        if self.device is not None and plan.num_scheduled_tokens:
            seqs = [by_id[seq_id] for seq_id in plan.num_scheduled_tokens]
            shape = BatchShape.of(
                (
                    (by_id[seq_id].num_computed_tokens, count)
                    for seq_id, count in plan.num_scheduled_tokens.items()
                ),
                eager=is_eager(
                    len(seqs),
                    sum(seq.is_decoding for seq in seqs),
                    plan.total_tokens,
                    self.device.mixed,
                ),
            )
            assert plan.shape in (shape, BatchShape())  # no model, no shape
            seconds = self.device.profiled(shape) * self.noise()
            self.now += seconds
        for seq_id, count in plan.num_scheduled_tokens.items():
            self.advance(by_id[seq_id], count)
        if plan.num_scheduled_tokens:
            self.planner.observe(plan, seconds)
        self.pool.check_integrity(self.running)
        return plan

    def run(self, arrivals: list[Sequence], *, until: float = float("inf")) -> None:
        """Serve sequences that arrive at their arrival times, to the end."""
        todo = sorted(arrivals, key=lambda s: s.request.arrival_s)
        while todo or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.now = max(self.now, todo[0].request.arrival_s)
            while todo and todo[0].request.arrival_s <= self.now:
                self.waiting.append(todo.pop(0))
            plan = self.step()
            if not plan.num_scheduled_tokens and not plan.reject:
                raise AssertionError("an iteration ran nothing although there is work")
            if self.now > until:
                return

    def _settle(self, plan: IterationPlan, by_id: dict[str, Sequence]) -> None:
        for seq_id in plan.admit:
            by_id[seq_id].standing = Standing.ADMITTED
        for seq_id in plan.relegate:
            by_id[seq_id].standing = Standing.BEST_EFFORT
        for seq_id in plan.reject:
            seq = by_id[seq_id]
            assert seq.state is SequenceState.WAITING
            seq.state = SequenceState.FINISHED
            self.waiting.remove(seq)
            self.rejected.append(seq)

    def _start(self, plan: IterationPlan, by_id: dict[str, Sequence]) -> None:
        for seq_id in plan.preempt:
            seq = by_id[seq_id]
            assert seq.state is SequenceState.RUNNING
            assert seq_id not in plan.num_scheduled_tokens
            self.pool.release(seq)
            seq.num_computed_tokens, seq.state = 0, SequenceState.WAITING
            seq.num_preemptions += 1
            self.running.remove(seq)
            self.waiting.append(seq)
        for seq_id in plan.start:
            seq = by_id[seq_id]
            assert seq.state is SequenceState.WAITING
            seq.num_computed_tokens, seq.state = self.pool.attach(seq), SequenceState.RUNNING
            self.waiting.remove(seq)
            self.running.append(seq)
        for seq_id, count in plan.num_scheduled_tokens.items():
            assert 1 <= count <= by_id[seq_id].num_uncomputed_tokens
            self.pool.grow(by_id[seq_id], count)  # raises if the planner promised too much

    def advance(self, seq: Sequence, count: int) -> None:
        seq.num_computed_tokens += count
        self.pool.commit(seq)
        if seq.num_uncomputed_tokens:
            return
        seq.token_ids.append(self.rng.randrange(3))
        if seq.progress is not None:
            seq.progress.add_token(self.now)
        if seq.num_output_tokens == seq.request.seed:
            seq.state = SequenceState.FINISHED
            self.running.remove(seq)
            self.pool.release(seq)
            self.finished.append(seq)
            self.planner.finished(seq)
