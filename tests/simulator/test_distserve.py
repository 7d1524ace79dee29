"""Prefill and decode apart: times by hand, memory on both sides, and dispatch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from toy import TOY, chats, run, single, singles

from minserve.engine.block_pool import BlockPool
from minserve.planner.policies.fcfs import FcfsPlanner
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.planner.predict.perf_model import BatchShape
from minserve.simulator.distserve import DecodeReplica, DistServeCluster, PrefillReplica
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulation import SimulationResult
from minserve.workload.conversation import Conversation, num_turns

# 2^-7 s for the KV of each token of the toy device.
SLOW_LINK = TOY.kv_bytes * 2**7


def apart(workload: list[Conversation], **settings: Any) -> SimulationResult:
    return run(workload, policy="distserve", **settings)


def seconds(*chunks: tuple[int, int]) -> float:
    return TOY.perf_model().profiled(BatchShape.of(chunks))


def test_the_first_token_comes_from_the_prefill_and_the_second_after_the_transfer() -> None:
    (verdict,) = apart([single(1.0, 96, 3)], link_bytes_s=SLOW_LINK).verdicts
    assert verdict.ttft_s == seconds((0, 96))
    decodes = seconds((96, 1)) + seconds((97, 1))
    assert 2 * verdict.tpot_s == 96 / 2**7 + decodes


def test_the_link_of_each_gpu_carries_its_own_share() -> None:
    two = replace(TOY, num_gpus=2)
    (verdict,) = apart([single(1.0, 96, 2)], device=two, link_bytes_s=SLOW_LINK).verdicts
    assert verdict.tpot_s == 96 / 2**8 + seconds((96, 1))


def test_an_output_of_one_token_is_never_sent() -> None:
    result = apart([single(1.0, 96, 1)], link_bytes_s=1.0)
    assert result.seconds == 1.0 + seconds((0, 96))


def test_prompts_run_whole_and_together_up_to_the_token_limit() -> None:
    # The first one runs alone; the others wait for it, and 60 + 60 tokens do not fit in 100.
    workload = [single(0.0, 50, 1), *[single(2**-10 * i, 60, 1) for i in (1, 2)]]
    first, second, third = apart(workload, token_budget=100).verdicts
    ends = [seconds((0, 50)), seconds((0, 60)), seconds((0, 60))]
    assert first.ttft_s == ends[0]
    assert second.ttft_s + 2**-10 == sum(ends[:2])
    assert third.ttft_s + 2**-9 == sum(ends)
    *_, second, third = apart(workload, token_budget=120).verdicts
    assert second.ttft_s + 2**-10 == third.ttft_s + 2**-9 == ends[0] + seconds((0, 60), (0, 60))


def test_decodes_are_not_disturbed_by_prefills() -> None:
    workload = [single(0.0, 32, 40), *[single(0.2 + i / 8, 500, 1) for i in range(6)]]
    longest = max(apart(workload).verdicts, key=lambda verdict: verdict.output_tokens)
    assert longest.tpot_s == pytest.approx(
        sum(seconds((32 + i, 1)) for i in range(39)) / 39, rel=0.01
    )


class Apart:
    """One group with access to its parts."""

    def __init__(self, prefill_blocks: int, decode_blocks: int, ratio: tuple[int, int]) -> None:
        self.loop = EventLoop()
        model = TOY.perf_model
        self.prefills = [
            PrefillReplica(
                FcfsPlanner(model(), chunked_prefill=False), BlockPool(prefill_blocks, 16),
                model(), clock=self.loop.clock, token_budget=512, max_num_seqs=64,
            )
            for _ in range(ratio[0])
        ]  # fmt: skip
        self.decodes = [
            DecodeReplica(
                SarathiPlanner(model()), BlockPool(decode_blocks, 16), model(),
                clock=self.loop.clock, token_budget=512, max_num_seqs=64,
            )
            for _ in range(ratio[1])
        ]  # fmt: skip
        self.cluster = DistServeCluster(self.loop, self.prefills, self.decodes, 2**-12)

    def serve(self, workload: list[Conversation]) -> OfferedLoad:
        load = OfferedLoad(
            self.loop, workload, TOY.perf_model(), TOY.max_model_len, {}, self.cluster.arrive
        )
        self.cluster.load = load
        self.loop.run()
        for replica in self.cluster.replicas:
            replica.pool.check_integrity([])
            assert replica.pool.num_free_blocks == replica.pool.num_blocks
        return load


@pytest.mark.parametrize("ratio", [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("blocks", [(400, 400), (40, 400), (400, 44), (40, 44)])
def test_nothing_is_lost_however_little_memory_there_is(
    blocks: tuple[int, int], ratio: tuple[int, int]
) -> None:
    workload = chats(12.0, 50)
    group = Apart(*blocks, ratio)
    load = group.serve(workload)
    assert len(load.verdicts) == num_turns(workload)
    lengths = Counter(turn.output_tokens for one in workload for turn in one.turns)
    assert Counter(verdict.output_tokens for verdict in load.verdicts) == lengths
    if blocks[1] == 44 and ratio == (1, 1):
        assert group.decodes[0].planner.num_preemptions > 0


def test_kv_waits_at_the_prefill_replica_until_there_is_room_for_it() -> None:
    """Prompts of 10 blocks, and a decode replica that holds one of them at a time."""
    group = Apart(18, 16, (1, 1))
    held: list[int] = []
    prefill = group.prefills[0]
    group.loop.at(1.0, lambda: held.append(prefill.pool.num_free_blocks))
    # The third one finds no memory to begin with, although its replica does nothing.
    load = group.serve([single(0.0, 160, 80), single(0.01, 160, 2), single(0.02, 160, 2)])
    assert held == [8]
    first, second, third = sorted(load.verdicts, key=lambda verdict: verdict.arrival_s)
    assert second.ttft_s < 0.2
    decoded_s = 79 * first.tpot_s
    assert second.tpot_s > decoded_s - 0.2
    assert third.ttft_s > decoded_s - 0.2


def test_prompts_go_where_least_is_to_be_computed_and_kv_where_most_is_free() -> None:
    group = Apart(400, 400, (2, 2))
    group.serve(singles(200.0, 120))
    for side in (group.prefills, group.decodes):
        few, many = sorted(replica.num_iterations for replica in side)
        assert few > 0.6 * many


def test_a_turn_goes_where_its_prefix_is_cached() -> None:
    workload = chats(2.0, 40)
    group = Apart(400, 400, (2, 1))
    group.serve(workload)
    reusable = sum(turn.shared_tokens for one in workload for turn in one.turns)
    assert sum(one.pool.prefix_hits_tokens for one in group.prefills) > 0.5 * reusable
    assert group.decodes[0].pool.prefix_hits_tokens > 0.5 * reusable


def test_groups_multiply() -> None:
    workload = singles(40.0, 80)
    few = apart(workload, ratio=(2, 1), kv_tokens=1024)
    many = apart(workload, ratio=(2, 1), kv_tokens=1024, replicas=3)
    assert sum(v.attained for v in many.verdicts) > sum(v.attained for v in few.verdicts)
