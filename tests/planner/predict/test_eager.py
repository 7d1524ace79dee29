"""Eager batches: who they are, and planning for a device on which they cost more."""

from __future__ import annotations

import random

import pytest
from replay import Replay, make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.planner.policies.registry import make_planner
from minserve.planner.predict.eager import NO_MIXED, DraftPasses, MixedLimit, is_eager
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import Sequence
from minserve.slo.objectives import SLO

# Decodes are graphs of 4 ms; with a prefill beside them a batch takes three times as long.
GRAPHS = (Piece(tokens=1e-5, eager=0.008, base=0.004), Piece(tokens=1e-4, base=0.003))
BRISK = SLO(ttft=0.5, tpot=0.014, name="brisk")


def device(mixed: MixedLimit = NO_MIXED) -> PerfModel:
    return PerfModel(GRAPHS, margin=1.02, mixed=mixed)


def load(rate: float, count: int, seed: int = 0) -> list[Sequence]:
    """Poisson arrivals; half of the prompts begin alike."""
    rng, now, found = random.Random(seed), 0.0, []
    for i in range(count):
        now += rng.expovariate(rate)
        prompt = [rng.choice([7, 1000 + i])] * 64 + [i] * rng.randint(1, 100)
        found.append(make_sequence(f"r{i}", prompt, rng.randint(2, 60), now, slo=BRISK))
    return found


def test_a_batch_is_eager_where_somebody_does_not_decode() -> None:
    assert not is_eager(4, 4, 10**6, NO_MIXED)
    assert is_eager(4, 3, 4, NO_MIXED)
    assert is_eager(1, 0, 1, NO_MIXED)


def test_a_batch_with_prefills_is_a_graph_up_to_the_recorded_size() -> None:
    mixed = MixedLimit(max_tokens=64, max_chunks=2)
    assert not is_eager(10, 8, 64, mixed)
    assert not is_eager(2, 0, 64, mixed)
    assert is_eager(10, 8, 65, mixed)
    assert is_eager(10, 7, 64, mixed)
    assert not is_eager(100, 100, 100, mixed)


def test_the_passes_of_a_draft_model_are_graphs_by_the_same_rule() -> None:
    passes = DraftPasses(MixedLimit(64, 2), most_decode_tokens=2)
    assert not passes.is_eager([1, 2, 2] * 50)
    assert not passes.is_eager([40, 1, 20])
    assert passes.is_eager([60, 2, 3])
    assert passes.is_eager([3, 3, 3])
    assert DraftPasses(NO_MIXED, 2).is_eager([3])
    assert not DraftPasses().is_eager([10**6])


@pytest.mark.parametrize("mixed", [NO_MIXED, MixedLimit(48, 2)], ids=["decodes", "mixed"])
@pytest.mark.parametrize("policy", ["fcfs", "sarathi", "edf", "dp"])
def test_every_plan_says_of_its_batch_whether_it_is_eager(policy: str, mixed: MixedLimit) -> None:
    """Held against the sequences themselves by the replay, in each of its steps."""
    seen: set[int] = set()

    class Watching(Replay):
        def launched(self, plan, by_id) -> None:
            seen.add(plan.shape.eager)

    pool = BlockPool(40, 16, prefix_caching=True)
    own = device(mixed)
    replay = Watching(make_planner(policy, model=own), pool, 128, 16, device=device(mixed))
    replay.run(load(20.0, 60))
    assert len(replay.finished) == 60
    assert mixed != NO_MIXED or any(seq.num_preemptions for seq in replay.finished)
    assert seen == {0, 1}


def test_promises_are_kept_where_a_prefill_makes_a_batch_three_times_as_long() -> None:
    pool = BlockPool(4000, 16, prefix_caching=False)
    replay = Replay(make_planner("dp", model=device()), pool, 512, 64, device=device())
    requests = load(3.0, 60)
    replay.run(requests)
    assert sum(seq.progress.attained for seq in requests) / len(requests) > 0.95
