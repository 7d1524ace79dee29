"""Simulations that can be worked out by hand, and what a setup refuses."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy import LOOSE, TIGHT, TOY, chats, run, single, singles

from minserve.devices import PUBLISHED, find_device
from minserve.engine.block_pool import BlockPool
from minserve.errors import SimulationError, WorkloadError
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.simulator.events import EventLoop
from minserve.simulator.simulated_device import SimulatedProposer
from minserve.simulator.simulated_replica import SimulatedReplica
from minserve.simulator.simulated_sequence import SimulatedSequence
from minserve.simulator.simulation import Setup, SimulationResult, simulate
from minserve.slo.objectives import SLO, preset_classes
from minserve.workload.conversation import Conversation, Turn, num_turns
from minserve.workload.verdict import Cause

ONE_POLICY_EACH = ["dp", "edf", "vllm", "sarathi", "fcfs", "distserve"]


def seconds(*chunks: tuple[int, int]) -> float:
    """Of a batch on the toy device: (tokens computed before, tokens run) per sequence."""
    return TOY.perf_model().profiled(BatchShape.of(chunks))


@pytest.mark.parametrize("policy", ["dp", "edf", "vllm", "sarathi", "fcfs"])
def test_a_lone_request_takes_a_prefill_and_then_a_decode_per_token(policy: str) -> None:
    (verdict,) = run([single(1.0, 100, 3)], policy=policy).verdicts
    assert verdict.ttft_s == seconds((0, 100))
    assert verdict.tpot_s == (seconds((100, 1)) + seconds((101, 1))) / 2
    assert verdict.attained
    assert verdict.attained_mean
    assert verdict.arrival_s == 1.0
    assert (verdict.prompt_tokens, verdict.output_tokens) == (100, 3)


def test_a_prompt_beyond_the_token_budget_takes_several_iterations() -> None:
    (verdict,) = run([single(0.0, 100, 1)], policy="sarathi", token_budget=64).verdicts
    assert verdict.ttft_s == seconds((0, 64)) + seconds((64, 36))
    (verdict,) = run([single(0.0, 100, 1)], policy="fcfs", token_budget=64).verdicts
    assert verdict.ttft_s == seconds((0, 100)), "fcfs runs whole prompts, however long"


def test_a_slow_device_takes_longer_than_its_profile_and_promises_stay_those_of_the_profile() -> (
    None
):
    (verdict,) = run([single(0.0, 100, 2)], slowness=2.0).verdicts
    assert verdict.ttft_s == 2 * seconds((0, 100))
    (verdict,) = run([single(0.0, 100, 2)], slowness=16.0).verdicts
    assert verdict.cause is Cause.LATE_TTFT


def test_an_iteration_takes_the_host_s_overhead_longer_however_slow_the_device() -> None:
    (verdict,) = run([single(0.0, 100, 2)], slowness=2.0, overhead_s=0.25).verdicts
    assert verdict.ttft_s == 2 * seconds((0, 100)) + 0.25
    assert verdict.tpot_s == 2 * seconds((100, 1)) + 0.25


@pytest.mark.parametrize("policy", ["dp", "distserve"])
def test_whoever_asks_waits_for_the_way_of_a_request_too(policy: str) -> None:
    workload = [single(1.0, 100, 3)]
    (near,) = run(workload, policy=policy).verdicts
    (far,) = run(workload, policy=policy, request_s=0.125).verdicts
    assert far.arrival_s == near.arrival_s == 1.0
    assert far.ttft_s == near.ttft_s + 0.125
    assert far.tpot_s == near.tpot_s
    # Twelve times a lone prefill are promised: in time for the engine, late for the client.
    late = run(workload, policy=policy, request_s=12 * seconds((0, 100))).verdicts
    assert [one.cause for one in late] == [Cause.LATE_TTFT]


def test_each_turn_of_a_conversation_has_a_way_to_go() -> None:
    first = Turn(slo=LOOSE, prompt_tokens=64, output_tokens=2)
    second = Turn(slo=LOOSE, prompt_tokens=80, output_tokens=1, shared_tokens=66, delay_s=2.0)
    workload = [Conversation(0.0, (first, second))]
    near, far = (run(workload, request_s=one).verdicts for one in (0.0, 0.125))
    assert far[1].arrival_s == near[1].arrival_s + 0.125
    assert far[1].ttft_s == near[1].ttft_s + 0.125


def test_a_length_that_is_told_is_planned_for_at_once() -> None:
    # Of memory for 40 blocks, outputs of unknown length are believed to take 8 each.
    workload = [single(0.0, 16, 1) for _ in range(12)]
    settings = {"kv_tokens": 640, "policy": "dp"}
    waits = {
        how: max(one.ttft_s for one in run(workload, lengths=how, **settings).verdicts)
        for how in ("told", "oracle", "quantile")
    }
    assert waits["told"] == waits["oracle"] < waits["quantile"]


def test_a_later_turn_arrives_after_its_delay_and_computes_only_what_is_new() -> None:
    first = Turn(slo=LOOSE, prompt_tokens=64, output_tokens=4)
    # Of the 68 tokens that are known, 67 have KV, and 64 of these fill blocks.
    second = Turn(slo=LOOSE, prompt_tokens=80, output_tokens=2, shared_tokens=68, delay_s=2.0)
    verdicts = run([Conversation(0.0, (first, second))], policy="sarathi").verdicts
    end = seconds((0, 64)) + sum(seconds((64 + i, 1)) for i in range(3))
    assert verdicts[1].arrival_s == end + 2.0
    assert verdicts[1].ttft_s == seconds((64, 16))


def test_thinking_ends_a_stage_after_its_tokens() -> None:
    slo = preset_classes()["reasoning"]
    turn = Turn(slo=slo, prompt_tokens=20, output_tokens=30, thinking_tokens=10)
    (verdict,) = run([Conversation(0.0, (turn,))]).verdicts
    assert verdict.attained
    # 70 ms per token: too slow for the thoughts at 50 ms, not for the answer at 100 ms.
    slow = replace(TOY, pieces=(Piece(tokens=1e-6, base=0.07),))
    for thinking, cause in ((10, Cause.LATE_TPOT), (1, None)):
        (verdict,) = run(
            [Conversation(0.0, (replace(turn, thinking_tokens=thinking),))], device=slow
        ).verdicts
        assert verdict.cause is cause


@pytest.mark.parametrize("policy", ONE_POLICY_EACH)
def test_the_same_seed_gives_the_same_verdicts(policy: str) -> None:
    settings = {"policy": policy, "noise": 0.2, "kv_tokens": 1024}
    if policy != "distserve":
        settings["max_speculation"] = 3
    first = run(chats(8.0, 30), **settings, seed=5)
    assert first.verdicts == run(chats(8.0, 30), **settings, seed=5).verdicts
    assert first.verdicts != run(chats(8.0, 30), **settings, seed=6).verdicts


@pytest.mark.parametrize("policy", ONE_POLICY_EACH)
def test_every_turn_ends_in_one_verdict_even_where_there_is_far_too_much(policy: str) -> None:
    workload = chats(60.0, 60)
    result = run(workload, policy=policy, kv_tokens=1024)
    assert len(result.verdicts) == num_turns(workload)
    offered = Counter(t.output_tokens for one in workload for t in one.turns)
    assert Counter(verdict.output_tokens for verdict in result.verdicts) == offered
    assert not all(verdict.attained for verdict in result.verdicts)
    assert 0.5 < result.busy_share <= 1.0


def test_whoever_asks_to_be_refused_is_and_its_later_turns_are_not_sent() -> None:
    impatient = replace(TIGHT, on_unattainable="reject")
    turns = (
        Turn(slo=impatient, prompt_tokens=500, output_tokens=2),
        Turn(slo=impatient, prompt_tokens=520, output_tokens=2, shared_tokens=502),
    )
    # All at once: not all of them can be first.
    workload = [Conversation(0.0, turns) for _ in range(30)]
    causes = Counter(verdict.cause for verdict in run(workload).verdicts)
    assert causes[Cause.REJECTED] >= 1
    assert causes[Cause.NOT_SENT] >= 1
    assert sum(causes.values()) == 60


@pytest.mark.parametrize("acceptance", [0.3, 0.8])
def test_drafts_are_accepted_as_often_as_was_asked(acceptance: float) -> None:
    looked_at = accepted = 0

    class CountingPlanner(SarathiPlanner):
        def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
            nonlocal looked_at, accepted
            looked_at += min(num_accepted + 1, num_drafted)
            accepted += num_accepted

    loop = EventLoop()
    replica = SimulatedReplica(
        CountingPlanner(),
        BlockPool(2000, 16),
        TOY.perf_model(),
        clock=loop.clock,
        token_budget=512,
        max_num_seqs=64,
        proposer=SimulatedProposer(4, lags=False),
        acceptance=acceptance,
        seed=3,
    )
    for number in range(40):
        replica.submit(sequence(str(number), output=300))
    finish(replica, loop)
    assert looked_at > 5000
    assert accepted / looked_at == pytest.approx(acceptance, abs=0.02)


def test_accepted_drafts_save_iterations_one_for_one() -> None:
    """With every draft accepted, verifying 3 drafts gives 4 tokens."""
    (verdict,) = run(
        [single(0.0, 32, 9)], policy="sarathi", max_speculation=3, acceptance=1.0
    ).verdicts
    # 1 token of the prefill, then two verifications of 1 + 3.
    assert verdict.output_tokens == 9
    assert 8 * verdict.tpot_s == pytest.approx(seconds((32, 4)) + seconds((36, 4)))
    (verdict,) = run(
        [single(0.0, 32, 9)], policy="sarathi", max_speculation=3, acceptance=0.0
    ).verdicts
    assert 8 * verdict.tpot_s == pytest.approx(sum(seconds((32 + i, 4)) for i in range(8)))


def test_the_pool_is_whole_after_every_iteration_and_empty_at_the_end() -> None:
    loop = EventLoop()
    replica = SimulatedReplica(
        SarathiPlanner(),
        BlockPool(40, 16),
        TOY.perf_model(),
        clock=loop.clock,
        token_budget=128,
        max_num_seqs=32,
        proposer=SimulatedProposer(3, lags=True),
        acceptance=0.6,
    )
    for number in range(20):
        replica.submit(sequence(str(number), prompt=20 + number, output=90))
    finish(replica, loop)
    assert replica.planner.num_preemptions > 0
    assert replica.pool.num_free_blocks == 40


def test_an_interrupted_simulation_keeps_what_it_has() -> None:
    result = SimulationResult()

    def stop(load: Any) -> None:
        if len(load.verdicts) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(singles(10.0, 20), Setup(device=TOY), stop, into=result)
    assert len(result.verdicts) == 5
    assert result.seconds > 0
    assert result.busy_share > 0


class NeverPlanner(Planner):
    name = "never"

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        return IterationPlan()


def test_a_policy_that_runs_nothing_is_found_out() -> None:
    loop = EventLoop()
    replica = SimulatedReplica(
        NeverPlanner(),
        BlockPool(8, 16),
        TOY.perf_model(),
        clock=loop.clock,
        token_budget=64,
        max_num_seqs=4,
    )
    replica.submit(sequence())
    with pytest.raises(SimulationError, match="never runs nothing although 1 sequences wait"):
        finish(replica, loop)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": "best"}, "no policy 'best'; there are dp, edf, sarathi"),
        ({"router": "magic"}, "no router 'magic'"),
        ({"lengths": "guess"}, "no estimate of lengths 'guess'"),
        ({"replicas": 0}, "number of replicas must be at least 1 and at most 4096, not 0"),
        ({"ratio": (0, 1), "policy": "distserve"}, "prefill or decode replicas"),
        ({"token_budget": 0}, "token budget must be at least 1, not 0"),
        ({"kv_tokens": 3}, "KV tokens must be at least 16"),
        ({"max_speculation": -1}, "speculation length"),
        ({"acceptance": 1.5}, "acceptance must be at least 0 and at most 1"),
        ({"noise": -0.1}, "noise must be at least 0, not -0.1"),
        ({"noise": math.nan}, "noise must be at least 0, not nan"),
        ({"speed_steps": 0.5}, "factor of speed steps must be at least 1 and at most 100, not 0.5"),
        ({"stall_every_s": 0.0}, "mean seconds between stalls must be at least 0.1, not 0"),
        ({"stall_every_s": math.nan}, "between stalls must be at least 0.1, not nan"),
        ({"clairvoyant": True, "policy": "vllm"}, "a clairvoyant planner is one of dp, edf"),
        ({"slowness": 0.0}, "slowness"),
        ({"slowness": math.inf}, "slowness"),
        ({"overhead_s": -0.1}, "overhead of iterations must be at least 0, not -0.1"),
        ({"request_s": math.nan}, "overhead of requests must be at least 0, not nan"),
        ({"length_error": 0.3}, "needs an oracle"),
        ({"policy": "distserve", "max_speculation": 2}, "distserve drafts nothing"),
        ({"device": PUBLISHED["opt-13b-h100"], "max_speculation": 2}, "draft model costs"),
        ({"device": replace(TOY, kv_tokens=None)}, "give --kv-tokens"),
        ({"device": replace(TOY, kv_bytes=0), "policy": "distserve"}, "how large the KV"),
    ],
)
def test_a_setup_refuses_what_makes_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        Setup(**({"device": TOY} | settings))


def test_a_request_beyond_the_memory_is_refused_before_anything_runs() -> None:
    with pytest.raises(WorkloadError, match=r"590 \+ 20 tokens is longer than toy can serve"):
        run([single(0.0, 590, 20)])
    with pytest.raises(WorkloadError, match="64 of KV"):
        run([single(0.0, 60, 20)], kv_tokens=64)


def test_gpus_are_counted_over_all_replicas() -> None:
    device = PUBLISHED["opt-13b-2xa100"]
    assert Setup(device=device, replicas=3).num_gpus == 6
    assert Setup(device=device, replicas=3, policy="distserve", ratio=(2, 1)).num_gpus == 18


def test_an_oracle_that_errs_errs_by_as_much_as_was_asked() -> None:
    workload = singles(8.0, 60)
    exact = run(workload, lengths="oracle", kv_tokens=1024)
    wrong = run(workload, lengths="oracle", length_error=2.0, kv_tokens=1024)
    assert exact.verdicts != wrong.verdicts
    assert exact.verdicts == run(workload, lengths="oracle", kv_tokens=1024).verdicts


def test_the_file_of_a_profile_is_a_device(tmp_path: Path) -> None:
    model = PerfModel((Piece(tokens=1e-3, base=0.01),), margin=1.2)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"key": {"model": "mine"}, "model": model.to_dict()}))
    device = find_device(str(file))
    assert (device.name, device.pieces, device.kv_tokens) == ("mine", model.pieces, None)
    assert device.perf_model().margin == 1.2
    (verdict,) = run([single(0.0, 50, 1)], device=device, kv_tokens=640).verdicts
    assert verdict.ttft_s == pytest.approx(0.06)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"pieces": []}, "key": {}}', "\0"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(WorkloadError, match="is not a profile"):
        find_device(str(file))
    with pytest.raises(WorkloadError, match=r"neither a file .* nor one of opt-6.7b-a100"):
        find_device("no-such-thing")


def sequence(name: str = "0", prompt: int = 20, output: int = 5) -> SimulatedSequence:
    request = Request(
        request_id=name,
        prompt_token_ids=(int(name),) * prompt,
        params=SamplingParams(max_tokens=1000),
        seed=1,
        arrival_s=0.0,
        slo=LOOSE,
        targets=LOOSE.resolve(1.0, 1.0),
    )
    return SimulatedSequence(
        request, turn=Turn(slo=LOOSE, prompt_tokens=prompt, output_tokens=output)
    )


def finish(replica: SimulatedReplica, loop: EventLoop) -> None:
    while replica.has_work:
        loop.now += replica.begin()[0]
        replica.end()
        replica.core.check_integrity()


# --- deadlines of whole answers ---


def deadline(seconds: float, asked: SLO | None = None) -> list[Conversation]:
    turn = Turn(slo=SLO(finish=seconds), prompt_tokens=100, output_tokens=20, asked=asked)
    return [Conversation(0.0, (turn,))]


@pytest.mark.parametrize("policy", ["dp", "edf", "vllm", "sarathi", "fcfs", "distserve"])
def test_a_deadline_is_kept_up_to_the_last_token(policy: str) -> None:
    (verdict,) = run(deadline(1000.0), policy=policy).verdicts
    assert verdict.finish_s is not None
    assert verdict.attained
    (kept,) = run(deadline(verdict.finish_s * 1.001), policy=policy).verdicts
    (late,) = run(deadline(verdict.finish_s * 0.999), policy=policy).verdicts
    assert (kept.cause, late.cause) == (None, Cause.LATE_FINISH)
    assert not late.attained_mean


def test_a_turn_is_judged_by_its_own_promise_whatever_the_server_is_told() -> None:
    asked = SLO(ttft=1e-6, tpot=1e-6)
    (verdict,) = run(deadline(1000.0, asked)).verdicts
    assert (verdict.cause, verdict.best_effort) == (None, True)
    (verdict,) = run(deadline(1e-3, SLO(ttft=1e3))).verdicts
    assert (verdict.cause, verdict.best_effort) == (Cause.LATE_FINISH, False)
