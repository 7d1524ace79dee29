"""What a draft model catches up with where its passes are CUDA graphs up to a size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drafting_replay import ReplayProposer
from replay import make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.planner.batching.batch_builder import BatchBuilder
from minserve.planner.batching.draft_lengths import DraftCandidate
from minserve.planner.batching.timed_batch_builder import TimedBatchBuilder
from minserve.planner.plan import PlannerView
from minserve.planner.policies.fcfs import FcfsPlanner
from minserve.planner.predict.eager import DraftPasses, MixedLimit
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import SequenceState

# A batch takes 10 ms; each draft pass one, each token in it 10 us, and what is no graph 5 ms more.
DEVICE = PerfModel(
    [Piece(tokens=1e-9, base=0.01, draft_steps=1e-3, draft_tokens=1e-5, draft_eager=5e-3)]
)
PASSES = DraftPasses(MixedLimit(max_tokens=200, max_chunks=2), most_decode_tokens=2)


def builder_of(num_decodes: int, lag: int, passes: DraftPasses) -> TimedBatchBuilder:
    pool, proposer, seqs = BlockPool(600, 16, prefix_caching=False), ReplayProposer(6), []
    proposer.passes = passes
    for i in range(num_decodes):
        seq = make_sequence(f"d{i}", [1] * 1000, 40)
        pool.grow(seq, 1000)
        seq.state, seq.num_computed_tokens = SequenceState.RUNNING, 1000
        seq.token_ids.append(1)
        proposer.computed[seq.seq_id] = seq.num_tokens - 1 - lag
        seqs.append(seq)
    view = PlannerView(
        waiting=[], running=seqs, memory=pool, token_budget=512, max_num_seqs=8,
        speculation=proposer,
    )  # fmt: skip
    batch = TimedBatchBuilder(BatchBuilder(view), DEVICE)
    for seq in seqs:
        assert batch.decode(seq, 1.0)
    return batch


def catch_up(batch: TimedBatchBuilder, lag: int, limit: float) -> list[int]:
    for seq in batch.builder.view.running:
        batch.catch_up(DraftCandidate(seq, 0.9, 6, lag), limit)
    plan = batch.builder.plan
    assert batch.seconds <= limit + 1e-12
    reckoned = replace(plan)
    planner = FcfsPlanner()
    planner.model = DEVICE
    planner.reckon(reckoned, batch.builder.view)
    assert reckoned.shape == batch.shape
    return list(plan.catch_up.values())


@pytest.mark.parametrize(
    ("limit", "expected", "eager"),
    [
        (0.0125, [150], 0),  # 1.5 ms for tokens: all of them in a graph
        (0.0135, [200], 0),  # 2.5 ms: an eager pass has no time, so as many as a graph holds
        (0.0175, [200], 0),
        (0.0185, [250], 1),  # 7.5 ms, of which an eager pass leaves 2.5
        (0.0215, [500], 1),
    ],
)
def test_an_eager_pass_is_paid_for_or_a_graph_is_filled(
    limit: float, expected: list[int], eager: int
) -> None:
    batch = builder_of(1, 500, PASSES)
    found = catch_up(batch, 500, limit)
    assert sum(found) == pytest.approx(sum(expected), abs=1)
    assert batch.shape.draft_eager == eager


def test_many_that_catch_up_at_once_are_an_eager_pass() -> None:
    batch = builder_of(3, 40, PASSES)
    assert catch_up(batch, 40, 0.03) == [40, 40, 40]
    assert batch.shape.draft_eager == 1
    batch = builder_of(3, 2, PASSES)
    assert catch_up(batch, 2, 0.03) == [2, 2, 2]
    assert batch.shape.draft_eager == 0, "a token or two are decodes"


def test_where_nothing_is_a_graph_no_pass_costs_more() -> None:
    batch = builder_of(1, 500, DraftPasses())
    assert catch_up(batch, 500, 0.0161) == [500]
    assert batch.shape.draft_eager == 0
