"""`ReferenceReplica`: a slow twin of `SimulatedReplica`, which writes the engine's loop once more.

It shares the planner, the block pool and the performance model with the engine core, and nothing of
how a plan is carried out: the loop is as short as it can be without outputs, errors and statistics.
A `Cluster` of one replica can drive it.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from minserve.engine.block_pool import BlockPool
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.predict.eager import NO_MIXED, DraftPasses, is_eager
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence, SequenceState, by_rank
from minserve.simulator.simulated_replica import IDLE_S
from minserve.simulator.simulated_sequence import SimulatedSequence
from minserve.slo.objectives import Standing


class ReferenceDrafter:
    """The draft model in numbers: how many tokens of each sequence it has computed."""

    def __init__(self, max_tokens: int, *, lags: bool) -> None:
        self.max_tokens, self.lags = max_tokens, lags
        self.computed: dict[str, int] = {}
        self.passes = DraftPasses()

    def limit(self, seq: Sequence) -> int:
        return self.max_tokens

    def lag(self, seq: Sequence) -> int:
        return seq.num_tokens - 1 - self.computed.get(seq.seq_id, 0) if self.lags else 0

    def ran(self, seq: Sequence, num_tokens: int) -> None:
        self.computed[seq.seq_id] = self.computed.get(seq.seq_id, 0) + num_tokens


class ReferenceReplica:
    """Plans, and applies to its sequences what a plan says."""

    def __init__(
        self,
        planner: Planner,
        pool: BlockPool,
        model: PerfModel,
        *,
        clock: Callable[[], float],
        token_budget: int,
        max_num_seqs: int,
        drafter: ReferenceDrafter | None = None,
        acceptance: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.planner, self.pool, self.drafter = planner, pool, drafter
        self.busy = False
        self._model, self._clock = model, clock
        self._limits = {"token_budget": token_budget, "max_num_seqs": max_num_seqs}
        self._acceptance, self._rng = acceptance, random.Random(seed)
        self._waiting: list[SimulatedSequence] = []
        self._running: list[SimulatedSequence] = []
        self._by_id: dict[str, SimulatedSequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def submit(self, seq: SimulatedSequence) -> None:
        self._by_id[seq.seq_id] = seq
        insort(self._waiting, seq, key=by_rank)

    def view(self) -> PlannerView:
        return PlannerView(
            waiting=self._waiting,
            running=self._running,
            memory=self.pool,
            speculation=self.drafter,
            **self._limits,
        )

    def begin(self, gives_away: Any = None) -> tuple[float, list[SimulatedSequence]]:
        plan = self._plan = self.planner.plan(self.view(), self._clock())
        refused = self._settle(plan)
        self._start(plan)
        self.planner.started(plan)
        self.busy = True
        if not plan.num_scheduled_tokens:
            return IDLE_S, refused
        self._took_s = self._model.profiled(self._shape(plan))
        return self._took_s, refused

    def end(self) -> list[SimulatedSequence]:
        self.busy = False
        scheduled = self._plan.num_scheduled_tokens
        seqs = [self._by_id[seq_id] for seq_id in scheduled]
        for seq in seqs:
            self._advance(seq, scheduled[seq.seq_id])
            self.pool.commit(seq)
        ended = [seq for seq in seqs if seq.num_left == 0]
        for seq in ended:
            self.planner.finished(seq)
            self._release(seq)
            seq.state = SequenceState.FINISHED
            self._running.remove(seq)
            del self._by_id[seq.seq_id]
        if seqs:
            self.planner.observe(self._plan, self._took_s)
        return ended

    def _settle(self, plan: IterationPlan) -> list[SimulatedSequence]:
        for seq_id in plan.admit:
            self._by_id[seq_id].standing = Standing.ADMITTED
        for seq_id in plan.relegate:
            self._by_id[seq_id].standing = Standing.BEST_EFFORT
        refused = [self._by_id.pop(seq_id) for seq_id in plan.reject]
        for seq in refused:
            self._waiting.remove(seq)
            seq.state = SequenceState.FINISHED
        return [seq for seq in refused if seq.index == 0]

    def _start(self, plan: IterationPlan) -> None:
        for seq in [self._by_id[seq_id] for seq_id in plan.preempt]:
            self._release(seq)
            self._running.remove(seq)
            insort(self._waiting, seq, key=by_rank)
            seq.num_computed_tokens, seq.state = 0, SequenceState.WAITING
            seq.num_preemptions += 1
        for seq in [self._by_id[seq_id] for seq_id in plan.start]:
            seq.num_computed_tokens, seq.state = self.pool.attach(seq), SequenceState.RUNNING
            self._waiting.remove(seq)
            insort(self._running, seq, key=by_rank)
        for seq_id, num_tokens in plan.num_scheduled_tokens.items():
            self.pool.grow(self._by_id[seq_id], num_tokens)

    def _shape(self, plan: IterationPlan) -> BatchShape:
        """What the batch asks of the device; notes what the draft model computes for it."""
        seqs = {seq_id: self._by_id[seq_id] for seq_id in plan.num_scheduled_tokens}
        chunks = [
            (seqs[one].num_computed_tokens, n) for one, n in plan.num_scheduled_tokens.items()
        ]
        num_decodes = sum(seq.is_decoding for seq in seqs.values())
        eager = is_eager(len(seqs), num_decodes, plan.total_tokens, NO_MIXED)
        shape = BatchShape.of(chunks, eager=eager)
        if self.drafter is None or not (plan.speculation or plan.catch_up):
            return shape
        lacking = {one: self.drafter.lag(seqs[one]) for one in plan.speculation} | plan.catch_up
        for seq_id, num_tokens in lacking.items():
            self.drafter.ran(seqs[seq_id], num_tokens)
        return replace(
            shape,
            draft_steps=max([1, *plan.speculation.values()]),
            draft_tokens=sum(plan.speculation.values()) + sum(lacking.values()),
        )

    def _advance(self, seq: SimulatedSequence, num_tokens: int) -> None:
        num_drafted, decodes = self._plan.speculation.get(seq.seq_id, 0), seq.is_decoding
        seq.num_computed_tokens += num_tokens - num_drafted
        if seq.num_computed_tokens < seq.num_tokens:
            return
        num_accepted = 0
        while num_accepted < num_drafted and self._rng.random() < self._acceptance:
            num_accepted += 1
        if decodes and self.drafter is not None:
            self.planner.verified(seq, num_drafted, num_accepted)
            self.drafter.ran(seq, num_accepted)
        for number in range(min(num_accepted + 1, seq.num_left)):
            seq.num_computed_tokens += number > 0
            self._append(seq)
        self.pool.trim(seq)

    def _append(self, seq: SimulatedSequence) -> None:
        assert seq.progress is not None
        seq.token_ids.append(seq.request.seed)
        seq.progress.add_token(self._clock())
        seq.num_left -= 1
        if seq.num_thinking_left:
            seq.num_thinking_left -= 1
            if seq.num_thinking_left == 0:
                seq.progress.end_stage()

    def _release(self, seq: SimulatedSequence) -> None:
        self.pool.release(seq)
        if self.drafter is not None:
            self.drafter.computed.pop(seq.seq_id, None)
