"""Decodes that are scheduled in one step: the same plan as one by one, to the last digit."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from loads import mixed_load, replay_of
from replay import make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.planner.batching.batch_builder import BatchBuilder
from minserve.planner.batching.timed_batch_builder import TimedBatchBuilder
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.predict.eager import MixedLimit
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import Sequence, SequenceState

BLOCK = 4


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedBatchBuilder, "decode_all", lambda *_: False)
    monkeypatch.setattr(BatchBuilder, "schedule_all", lambda *_: False)


def decode(name: str, rng: random.Random, pool: BlockPool) -> Sequence:
    seq = make_sequence(name, [1] * rng.randint(1, 12), 50)
    seq.state = SequenceState.RUNNING
    seq.token_ids += [2] * rng.randint(1, 9)
    seq.num_computed_tokens = seq.num_tokens - 1
    pool.grow(seq, 0)
    return seq


def play(seed: int) -> tuple[IterationPlan, object, bool]:
    """Build a random batch, whose limits are often just what it needs.

    Returns:
        the plan, all else that later decisions rest on, and True if all decodes run.
    """
    rng = random.Random(seed)
    num = rng.randint(1, 12)
    pool = BlockPool(70 + rng.randint(0, 20), BLOCK, prefix_caching=False)
    seqs = [decode(f"s{i}", rng, pool) for i in range(num)]
    prefill = make_sequence("prefill", [1] * 20, 9)
    prefill.state = SequenceState.RUNNING
    view = PlannerView(
        waiting=[],
        running=[*seqs, prefill],
        memory=pool,
        token_budget=rng.choice([num - 1, num, 500]),
        max_num_seqs=rng.choice([max(1, num - 1), num, 500]),
    )
    pieces = [Piece(tokens=0.1, context_tokens=0.003, base=0.7), Piece(tokens=0.01, base=1.0)]
    pieces = pieces[: rng.choice([1, 1, 2])]
    model = PerfModel(pieces, margin=1.0, mixed=MixedLimit(30, 8))
    batch = TimedBatchBuilder(BatchBuilder(view), rng.choice([None, model, model]))
    if rng.random() < 0.2:
        batch.prefill(prefill, 9.0)
    needed = batch.seconds_of_decodes(seqs)
    limit = needed + rng.choice([0.0, 1e-16, 1.0, -0.1, -needed])
    run = batch.decodes(seqs, limit)
    state = (batch.seconds, batch.shape, batch.builder.budget, batch.builder._free, run)
    return batch.builder.plan, state, len(run) == num


def test_random_batches_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = [play(seed) for seed in range(600)]
    assert 100 < sum(whole for *_, whole in fast) < 500  # both kinds are there
    one_by_one(monkeypatch)
    for seed, (plan, state, _) in enumerate(fast):
        slow_plan, slow_state, _ = play(seed)
        assert plan == slow_plan, seed
        assert list(plan.num_scheduled_tokens) == list(slow_plan.num_scheduled_tokens)
        assert repr(state) == repr(slow_state), seed


@pytest.mark.parametrize(
    ("policy", "limits"),
    [("dp", {}), ("dp", {"blocks": 60, "max_num_seqs": 6}), ("edf", {"budget": 8}),
     ("fcfs", {"blocks": 60}), ("sarathi", {"blocks": 60, "budget": 40})],
)  # fmt: skip
def test_whole_loads_are_served_by_the_same_plans(
    monkeypatch: pytest.MonkeyPatch, policy: str, limits: dict[str, int]
) -> None:
    def plans() -> list[str]:
        replay = replay_of(policy, sigma=0.1, **limits)
        told: list[str] = []
        replay.launched = lambda plan, _: told.append(repr(plan))
        replay.run(mixed_load(2.0, 12.0))
        return told

    calls = counted(monkeypatch)
    fast = plans()
    assert calls
    one_by_one(monkeypatch)
    assert plans() == fast


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let what is scheduled in one step be listed."""
    done: list[bool] = []
    original: Callable[..., bool] = BatchBuilder.schedule_all

    def schedule_all(self: BatchBuilder, decodes: list[Sequence]) -> bool:
        found = original(self, decodes)
        if found and decodes:
            done.append(found)
        return found

    monkeypatch.setattr(BatchBuilder, "schedule_all", schedule_all)
    return done
