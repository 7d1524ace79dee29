"""Turns that ask for several outputs, simulated: one verdict each, and one replica for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy import LOOSE, TIGHT, chats, run, single, singles

from minserve.slo.objectives import SLO, OnUnattainable
from minserve.workload.conversation import Conversation, num_turns
from minserve.workload.verdict import Cause


def of(n: int, workload: list[Conversation]) -> list[Conversation]:
    """The same turns, each asking for so many outputs."""
    return [replace(one, turns=tuple(replace(t, n=n) for t in one.turns)) for one in workload]


@pytest.mark.parametrize("policy", ["dp", "edf", "sarathi", "fcfs", "distserve"])
def test_each_turn_gets_one_verdict(policy: str) -> None:
    workload = of(3, chats(2.0, 30))
    result = run(workload, policy=policy)
    assert len(result.verdicts) == num_turns(workload)
    turns = [turn for one in workload for turn in one.turns]
    tokens = sorted(3 * turn.output_tokens for turn in turns)
    assert sorted(one.output_tokens for one in result.verdicts) == tokens


def test_a_turn_attains_its_slo_only_if_all_outputs_do() -> None:
    # 8 ms a decode and 16 ms a batch: one output keeps 17 ms a token, and so do no hundred.
    pace = SLO(ttft=5.0, tpot=0.017)
    for n, cause in ((1, None), (100, Cause.LATE_TPOT)):
        (verdict,) = run(of(n, [single(0.0, 5, 20, pace)]), policy="sarathi").verdicts
        assert verdict.cause is cause
        assert verdict.output_tokens == 20 * n


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_turn_is_refused_or_answered_as_a_whole(replicas: int) -> None:
    strict = [
        replace(slo, on_unattainable=OnUnattainable.REJECT, name=slo.name) for slo in (TIGHT, LOOSE)
    ]
    workload = [
        replace(one, turns=(replace(one.turns[0], n=1 + i % 8, slo=strict[i % 2]),))
        for i, one in enumerate(singles(8.0 * replicas, 80))
    ]
    result = run(workload, replicas=replicas, kv_tokens=2048)
    assert len(result.verdicts) == len(workload)
    refused = [one for one in result.verdicts if one.cause is Cause.REJECTED]
    assert 0 < len(refused) < len(workload)
    assert all(one.output_tokens == 0 for one in refused)
