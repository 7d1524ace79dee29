"""Tasks in the simulator: the server's own table, pool and router, on a virtual clock."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from toy import TOY, run

from minserve.cli.main import main
from minserve.devices import find_device
from minserve.simulator import cluster
from minserve.simulator.cluster import TurnPlacement
from minserve.simulator.simulated_sequence import SimulatedSequence
from minserve.simulator.simulation import Setup, SimulationResult, simulate
from minserve.slo.objectives import SLO
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.scenarios import find_scenario
from minserve.workload.task_terms import WAYS, TaskTerms, alone_s

DEVICE = find_device("toolllama-7b-a100")
SLOW = SLO(ttft_slowdown=8, tpot_slowdown=4, name="slow")


def tools(way: str, rate: float, seed: int, **settings: Any) -> SimulationResult:
    drawn = find_scenario("tools").draw(rate, seed=seed, num_requests=150)
    terms = TaskTerms(way=way)
    return simulate([replace(one, terms=terms) for one in drawn], Setup(device=DEVICE, **settings))


def in_time(result: SimulationResult) -> float:
    verdicts = result.task_verdicts
    return sum(one.attained for one in verdicts) / len(verdicts)


def agent(arrival_s: float, num_calls: int, terms: TaskTerms | None, delay_s: float = 1.0):
    turns, said = [], 0
    for number in range(num_calls):
        turns.append(
            Turn(
                slo=SLOW,
                prompt_tokens=said + 48,
                output_tokens=16,
                shared_tokens=said,
                delay_s=delay_s if number else 0.0,
            )
        )
        said = turns[-1].prompt_tokens + turns[-1].output_tokens
    return Conversation(arrival_s, tuple(turns), terms)


@pytest.mark.parametrize("way", WAYS)
def test_a_lone_task_is_in_time_and_takes_what_it_takes_alone(way: str) -> None:
    lone = agent(0.0, 4, TaskTerms(way=way, slowdown=2.0))
    (verdict,) = run([lone]).task_verdicts
    assert verdict.attained
    assert not verdict.given_up
    assert verdict.num_calls == 4
    expected_s = alone_s(lone, TOY.perf_model())
    assert verdict.finish_s == 2 * expected_s
    # The cache has whole blocks only, so that a few tokens more are computed.
    assert expected_s - 1e-9 <= verdict.took_s < 1.1 * expected_s


def test_where_there_is_too_much_to_do_tasks_are_better_than_their_calls_one_by_one() -> None:
    shares = {way: in_time(tools(way, 24.0, seed=0)) for way in WAYS}
    assert shares["whole"] >= max(shares["per-call"], shares["classes"])
    assert shares["whole"] > 0.5


def test_the_same_seed_gives_the_same_tasks() -> None:
    terms = TaskTerms(slowdown=2.0)
    workload = [agent(0.25 * number, 1 + number % 4, terms) for number in range(40)]
    assert run(workload).task_verdicts == run(workload).task_verdicts


def test_tasks_that_cannot_be_in_time_are_given_up() -> None:
    terms = TaskTerms(slowdown=1.0)
    workload = [agent(0.1 * number, 4, terms) for number in range(60)]
    result = run(workload)
    given_up = [one for one in result.task_verdicts if one.given_up]
    assert given_up
    # All of their calls are served nevertheless.
    assert all(one.took_s is not None for one in result.task_verdicts)
    assert not any(one.attained for one in given_up)


def test_a_held_prefix_spares_a_call_its_prefill_when_others_fill_the_pool() -> None:
    """Two agents with long pauses among chats that use every block again and again."""
    chat = SLO(ttft_slowdown=50, tpot_slowdown=50, name="chat")
    chats = [
        Conversation(0.5 + 0.25 * i, (Turn(slo=chat, prompt_tokens=400, output_tokens=8),))
        for i in range(60)
    ]
    agents = {way: agent(0.0, 3, TaskTerms(way=way, slowdown=20.0), delay_s=5.0) for way in WAYS}

    def second_ttft_s(way: str) -> float:
        result = run([agents[way], *chats], kv_tokens=1024)
        calls = sorted((v for v in result.verdicts if v.name == "slow"), key=lambda v: v.arrival_s)
        assert len(calls) == 3
        return calls[1].ttft_s + calls[2].ttft_s

    assert second_ttft_s("whole") < second_ttft_s("classes")


def test_calls_go_home_to_the_replica_of_their_task(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = TaskTerms(slowdown=4.0)
    workload = [agent(0.5 * number, 4, terms) for number in range(12)]
    homes: dict[int, set[int]] = {}

    class Noting(TurnPlacement):
        def went_to(self, number: int, one: SimulatedSequence) -> None:
            super().went_to(number, one)
            homes.setdefault(one.conversation, set()).add(number)

    monkeypatch.setattr(cluster, "TurnPlacement", Noting)
    result = run(workload, replicas=3)
    assert in_time(result) == 1.0
    assert [len(where) for where in homes.values()] == [1] * 12
    assert set.union(*homes.values()) == {0, 1, 2}


def test_the_command_reports_the_share_of_tasks_in_time(capsys: pytest.CaptureFixture) -> None:
    command = ["simulate", "--scenario", "tools", "--rate", "4", "--num-requests", "30", "--json"]
    assert main([*command, "--tasks", "--task-slowdown", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    tasks = told["runs"][0]["tasks"]
    assert told["tasks"] == "whole"
    assert tasks["attained"] == tasks["offered"] > 3
    assert main(command) == 0
    assert "tasks" not in json.loads(capsys.readouterr().out)["runs"][0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "some"], "known: whole, per-call, classes"),
        (["--task-slowdown", "2"], "needs --tasks"),
        (["--tasks", "whole", "--task-slowdown", "0.5"], "at least 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], says: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["simulate", "--scenario", "tools", *flags]) != 0
    assert says in capsys.readouterr().err
