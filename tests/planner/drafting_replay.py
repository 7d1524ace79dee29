"""`Replay` with somebody who drafts: drafts are accepted at a given rate, and cost time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from replay import Replay

from minserve.engine.block_pool import BlockPool
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.predict.eager import DraftPasses, is_eager
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence, SequenceState


class ReplayProposer:
    """A draft model as planners see it, with a record of what it has computed.

    Args:
        max_tokens: drafted at most.
        lags: False where it needs no KV of its own, as prompt lookup.
    """

    def __init__(self, max_tokens: int, *, lags: bool = True) -> None:
        self.max_tokens = max_tokens
        self._lags = lags
        self.computed: dict[str, int] = {}
        self.passes = DraftPasses()

    def limit(self, seq: Sequence) -> int:
        return self.max_tokens

    def lag(self, seq: Sequence) -> int:
        return seq.num_tokens - 1 - self.computed.get(seq.seq_id, 0) if self._lags else 0


class DraftingReplay(Replay):
    """Runs plans with drafts.

    Args:
        acceptance: chance that a drafted token is accepted, of all or by sequence id.
        check: called with each view and the plan made from it.

    Attributes:
        num_speculating: iterations in which tokens were drafted.
    """

    def __init__(
        self,
        planner: Planner,
        pool: BlockPool,
        budget: int,
        max_num_seqs: int,
        *,
        device: PerfModel | None = None,
        acceptance: float | Mapping[str, float] = 0.8,
        proposer: ReplayProposer | None = None,
        check: Callable[[PlannerView, IterationPlan], None] = lambda *_: None,
    ) -> None:
        super().__init__(planner, pool, budget, max_num_seqs, device=device)
        self.acceptance = acceptance
        self.proposer = proposer
        self.check = check
        self.num_speculating = 0

    def view(self) -> PlannerView:
        return replace(super().view(), speculation=self.proposer)

    def step(self) -> IterationPlan:
        view = self.view()
        plan = self.planner.plan(view, now=self.now)
        self.check(view, plan)
        by_id = {s.seq_id: s for s in self.waiting + self.running}
        self._check_drafts(plan, by_id)
        own = {k: n - plan.speculation.get(k, 0) for k, n in plan.num_scheduled_tokens.items()}
        self._settle(plan, by_id)
        self._start(replace(plan, num_scheduled_tokens=own), by_id)
        self.planner.started(plan)
        for seq_id, count in plan.num_scheduled_tokens.items():
            self.pool.grow(by_id[seq_id], count)  # raises if the planner promised too much
        seconds = self._seconds(plan, by_id)
        self.now += seconds
        self.num_speculating += bool(plan.speculation)
        for seq_id, count in own.items():
            self._run(by_id[seq_id], count, plan.speculation.get(seq_id, 0))
        if own:
            self.planner.observe(plan, seconds)
        self.pool.check_integrity(self.running)
        return plan

    def _check_drafts(self, plan: IterationPlan, by_id: Mapping[str, Sequence]) -> None:
        assert plan.total_tokens <= self.budget
        for seq_id, num in plan.speculation.items():
            seq = by_id[seq_id]
            assert seq.is_decoding
            assert seq.state is SequenceState.RUNNING
            assert plan.num_scheduled_tokens[seq_id] == 1 + num
            assert 1 <= num <= self.proposer.max_tokens
            left = seq.request.params.max_tokens - seq.num_output_tokens
            assert num < left, "the last token is never drafted"
            assert seq_id not in plan.catch_up

    def _seconds(self, plan: IterationPlan, by_id: Mapping[str, Sequence]) -> float:
        """By the device; and the draft model catches up and runs ahead."""
        chunks = [
            (by_id[seq_id].num_computed_tokens, count)
            for seq_id, count in plan.num_scheduled_tokens.items()
        ]
        steps, tokens = max(plan.speculation.values(), default=int(bool(plan.catch_up))), 0
        lengths = [self.proposer.lag(by_id[seq_id]) + 1 for seq_id in plan.speculation]
        lengths += plan.catch_up.values()
        for seq_id, num in plan.speculation.items():
            tokens += num + self.proposer.lag(by_id[seq_id])
            self.proposer.computed[seq_id] = by_id[seq_id].num_tokens - 1
        for seq_id, num in plan.catch_up.items():
            assert 1 <= num <= self.proposer.lag(by_id[seq_id])
            tokens += num
            self.proposer.computed[seq_id] = self.proposer.computed.get(seq_id, 0) + num
        if self.device is None or not chunks:
            return 0.0
        num_decodes = sum(by_id[seq_id].is_decoding for seq_id in plan.num_scheduled_tokens)
        eager = is_eager(len(chunks), num_decodes, plan.total_tokens, self.device.mixed)
        shape = BatchShape.of(chunks, eager=eager)
        passes = DraftPasses() if self.proposer is None else self.proposer.passes
        draft_eager = int(passes.is_eager(lengths))
        shape = replace(shape, draft_steps=steps, draft_tokens=tokens, draft_eager=draft_eager)
        assert plan.shape == shape
        return self.device.profiled(shape)

    def _run(self, seq: Sequence, count: int, num_drafted: int) -> None:
        decodes, accepted = seq.is_decoding, 0
        rate = self.acceptance
        rate = rate[seq.seq_id] if isinstance(rate, Mapping) else rate
        while accepted < num_drafted and self.rng.random() < rate:
            accepted += 1
        if decodes and self.proposer is not None:
            self.planner.verified(seq, num_drafted, accepted)
        self.advance(seq, count)
        for _ in range(accepted):
            if seq.state is SequenceState.RUNNING:
                self.advance(seq, 1)
        if seq.state is SequenceState.RUNNING:
            self.pool.trim(seq)
