"""Policies against a real block pool, with the forward pass replaced by appending a token."""

from __future__ import annotations

import random

import pytest
from replay import Replay, make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.errors import ConfigError
from minserve.planner.policies.base import Planner
from minserve.planner.policies.registry import POLICIES, make_planner

# With whether prompts are split: all policies can do that, and `fcfs` can do without.
FORMS = [*((name, True) for name in POLICIES), ("fcfs", False)]


@pytest.mark.parametrize(("name", "chunked"), FORMS)
@pytest.mark.parametrize("seed", range(12))
def test_every_request_finishes_however_small_the_pool(name: str, chunked: bool, seed: int) -> None:
    rng = random.Random(seed)
    block_size, num_blocks = rng.choice([1, 4, 16]), rng.randint(24, 60)
    capacity = block_size * num_blocks
    budget = rng.choice([8, 33, 200])
    pool = BlockPool(num_blocks, block_size, prefix_caching=rng.random() < 0.7)
    replay = Replay(make_planner(name, chunked_prefill=chunked), pool, budget, rng.randint(1, 8))
    todo = []
    for i in range(40):
        prompt_len = rng.randint(1, max(1, capacity // 2))
        output = rng.randint(1, max(1, min(30, capacity - prompt_len)))
        prompt = [rng.randrange(3) for _ in range(prompt_len)]
        todo.append(make_sequence(f"r{i}", prompt, output, arrival=i, priority=rng.randrange(2)))
    for _ in range(20_000):
        if todo and rng.random() < 0.3:
            replay.waiting.append(todo.pop(0))
        plan = replay.step()
        if replay.running or replay.waiting:
            assert plan.num_scheduled_tokens, "an iteration ran nothing although there is work"
        if chunked:
            assert plan.total_tokens <= budget
        if not todo and not replay.running and not replay.waiting:
            break
    assert len(replay.finished) == 40
    assert pool.num_free_blocks == num_blocks


def replay_with(
    planner: Planner, *, budget: int, blocks: int = 100, max_num_seqs: int = 8
) -> Replay:
    return Replay(planner, BlockPool(blocks, 4, prefix_caching=False), budget, max_num_seqs)


def test_sarathi_never_stalls_a_decode_for_a_prefill() -> None:
    replay = replay_with(make_planner("sarathi"), budget=16)
    replay.waiting = [make_sequence("short", [1, 2, 3], 50)]
    replay.step()
    replay.waiting = [make_sequence("long", [1] * 100, 5, arrival=1.0)]
    for _ in range(7):
        plan = replay.step()
        assert plan.num_scheduled_tokens["short"] == 1
        assert plan.num_scheduled_tokens["long"] <= 15
    assert plan.num_scheduled_tokens["long"] == 100 - 6 * 15


def test_fcfs_runs_whole_prompts_before_any_decode() -> None:
    replay = replay_with(make_planner("fcfs", chunked_prefill=False), budget=64)
    replay.waiting = [make_sequence("first", [1] * 10, 50)]
    assert replay.step().num_scheduled_tokens == {"first": 10}
    replay.waiting = [
        make_sequence("second", [1] * 40, 5, 1.0),
        make_sequence("third", [1] * 30, 5, 2.0),
    ]
    assert replay.step().num_scheduled_tokens == {"second": 40}
    assert replay.step().num_scheduled_tokens == {"third": 30}
    assert replay.step().num_scheduled_tokens == {"first": 1, "second": 1, "third": 1}


def test_fcfs_without_chunks_runs_a_prompt_beyond_the_budget_alone() -> None:
    replay = replay_with(make_planner("fcfs", chunked_prefill=False), budget=16)
    replay.waiting = [make_sequence("huge", [1] * 90, 2), make_sequence("next", [1] * 4, 2, 1.0)]
    assert replay.step().num_scheduled_tokens == {"huge": 90}


def test_fcfs_with_chunks_mixes_and_prefers_prefills() -> None:
    replay = replay_with(make_planner("fcfs"), budget=16)
    replay.waiting = [make_sequence("first", [1] * 10, 50)]
    replay.step()
    replay.waiting = [make_sequence("long", [1] * 30, 5, 1.0)]
    assert replay.step().num_scheduled_tokens == {"long": 16}
    assert replay.step().num_scheduled_tokens == {"long": 14, "first": 1}


def test_a_full_pool_preempts_the_last_arrival_and_it_resumes_with_its_tokens() -> None:
    replay = replay_with(make_planner("sarathi"), budget=64, blocks=6)
    early, late = make_sequence("early", [1] * 8, 16), make_sequence("late", [2] * 8, 8, 1.0)
    replay.waiting = [early, late]
    preempted = []
    while replay.waiting or replay.running:
        before = list(late.token_ids)
        plan = replay.step()
        preempted += plan.preempt
        assert late.token_ids[: len(before)] == before
    assert set(preempted) == {"late"}
    assert early.num_output_tokens == 16
    assert late.num_output_tokens == 8


def test_priority_goes_before_arrival() -> None:
    replay = replay_with(make_planner("sarathi"), budget=8, max_num_seqs=1)
    replay.waiting = [
        make_sequence("early", [1] * 4, 2),
        make_sequence("urgent", [1] * 4, 2, 5.0, -1),
    ]
    assert list(replay.step().num_scheduled_tokens) == ["urgent"]


def test_a_start_counts_blocks_that_running_prefills_still_need() -> None:
    replay = replay_with(make_planner("sarathi"), budget=16, blocks=20)
    replay.waiting = [make_sequence("long", [1] * 60, 4), make_sequence("next", [1] * 24, 4, 1.0)]
    while "next" in {s.seq_id for s in replay.waiting}:
        assert replay.step().preempt == []
    assert [s.seq_id for s in replay.finished] == ["long"]


def test_planners_count_what_they_decide() -> None:
    planner = make_planner("sarathi")
    replay = replay_with(planner, budget=8)
    replay.waiting = [make_sequence("a", [1] * 4, 2)]
    replay.step()
    assert (planner.num_plans, planner.num_starts, planner.num_preemptions) == (1, 1, 0)


def test_settings_that_a_policy_cannot_honour_are_refused() -> None:
    for name in ("sarathi", "dp"):
        with pytest.raises(ConfigError, match=f"{name} always chunks"):
            make_planner(name, chunked_prefill=False)
    with pytest.raises(ConfigError, match="unknown policy 'lifo'"):
        make_planner("lifo")
