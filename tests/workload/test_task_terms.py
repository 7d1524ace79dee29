"""Deadlines of whole tasks: what a server is told of them, and how they are judged."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from scripted_server import ScriptedServer, scripted_server

from minserve.errors import WorkloadError
from minserve.slo.objectives import SLO, Targets
from minserve.workload import client
from minserve.workload.client import Load, run_load
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.endpoint import find_endpoint
from minserve.workload.report import Report
from minserve.workload.scenarios import find_scenario
from minserve.workload.task_terms import TaskTerms, TaskVerdict, alone_s
from minserve.workload.verdict import Verdict

PATIENT = SLO(ttft=600.0, tpot=60.0, name="patient")


@dataclass
class ToySpeed:
    def zero_load_prefill_s(self, num_tokens: int) -> float:
        return num_tokens / 8

    def zero_load_decode_s(self, context_tokens: int) -> float:
        return 0.5


def agent(terms: TaskTerms | None, word: str = "good", delay_s: float = 0.25) -> Conversation:
    first = Turn(slo=PATIENT, prompt_tokens=8, output_tokens=4, text=f"{word}\n")
    second = Turn(
        slo=PATIENT,
        prompt_tokens=16,
        output_tokens=2,
        shared_tokens=12,
        delay_s=delay_s,
        text=f"\n{word}\n",
    )
    return Conversation(0.0, (first, second), terms)


def test_a_tasks_time_alone_is_that_of_its_calls_and_tools() -> None:
    # 8 tokens and 3 decodes; a quarter of a second; 4 new tokens and 1 decode.
    assert alone_s(agent(None), ToySpeed()) == 1.0 + 1.5 + 0.25 + 0.5 + 0.5
    assert TaskTerms(slowdown=2.0).finish_s(agent(None), ToySpeed()) == 7.5


def test_each_way_tells_a_server_something_else_of_the_same_task() -> None:
    def told(way: str, number: int) -> tuple[SLO, Targets]:
        terms = TaskTerms(way=way, slowdown=2.0)
        return terms.promise(agent(terms), number, ToySpeed(), "t")

    for number in (0, 1):
        slo, targets = told("whole", number)
        assert (slo.task.id, slo.task.finish, slo.task.calls) == ("t", 7.5, 2)
        assert (slo.name, targets) == ("patient", Targets())
        slo, targets = told("per-call", number)
        assert slo.finish == targets.finish_s == (7.5 - 0.25) / 2
        assert slo.task is None
        slo, targets = told("classes", number)
        assert (slo, targets.ttft_s) == (PATIENT, 600.0)


@pytest.mark.parametrize("wrong", [{"way": "none"}, {"slowdown": 0.5}, {"slowdown": math.inf}])
def test_terms_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError):
        TaskTerms(**wrong)


def test_a_report_counts_tasks_beside_requests() -> None:
    request = Verdict(name="a", arrival_s=0.0, cause=None, attained_mean=True)
    tasks = [
        TaskVerdict(arrival_s=0.0, finish_s=5.0, took_s=took_s, num_calls=2, given_up=took_s == 9.0)
        for took_s in (1.0, 5.0, 9.0, None)
    ]
    report = Report.of([request] * 8, 4.0, tasks)
    assert (report.attainment, report.kept) == (1.0, 0.5)
    assert report.to_dict()["tasks"] == {
        "offered": 4,
        "attained": 2,
        "attainment": 0.5,
        "given_up": 1,
        "took_ms": {"p50": 5000.0, "p90": None, "p99": None},
    }
    assert "tasks: 4, 50.0% in time, 1 given up" in report.table()
    alone = Report.of([request], 1.0)
    assert (alone.kept, "tasks" in alone.to_dict()) == (1.0, False)


def test_scenarios_draw_the_same_turns_with_and_without_tasks() -> None:
    scenario, terms = find_scenario("tools"), TaskTerms()
    plain = scenario.draw(2.0, seed=3, num_requests=20)
    assert all(one.terms is None for one in plain)
    assert any(len(one.turns) > 1 for one in plain)
    # Only terms are added, so that the ways are compared on one workload.
    drawn = [replace(one, terms=terms) for one in plain]
    assert [one.turns for one in drawn] == [one.turns for one in plain]


@pytest.fixture(autouse=True)
def _often_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POLL_S", 0.01)


def drive(server: ScriptedServer, *workload: Conversation) -> Load:
    endpoint = asyncio.run(find_endpoint(server.url))
    return run_load(endpoint, workload, ToySpeed())


def test_a_client_sends_each_call_with_the_task_it_belongs_to() -> None:
    terms = TaskTerms(way="whole", slowdown=1000.0)
    with scripted_server(owner="minserve") as server:
        load = drive(server, agent(terms, delay_s=0.0), agent(terms, delay_s=0.0))
    tasks = [body["slo"]["task"] for body in server.bodies]
    assert len(tasks) == 4
    assert len({task["id"] for task in tasks}) == 2
    assert {(task["finish_ms"], task["calls"]) for task in tasks} == {(3_500_000.0, 2)}
    verdicts = load.task_verdicts()
    assert [(one.attained, one.num_calls, one.given_up) for one in verdicts] == [
        (True, 2, False)
    ] * 2
    assert all(verdict.attained for verdict in load.verdicts())


def test_a_task_whose_call_fails_is_missed() -> None:
    terms = TaskTerms(way="per-call", slowdown=1000.0)
    with scripted_server(owner="minserve") as server:
        load = drive(server, agent(terms, "refused"), agent(terms, "good"))
    assert sorted(one.attained for one in load.task_verdicts()) == [False, True]
    assert any("finish_ms" in (body.get("slo") or {}) for body in server.bodies)
    assert not any("task" in (body.get("slo") or {}) for body in server.bodies)
