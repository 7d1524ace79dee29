"""The calls of a task go back to the replica that has their prefix, while it can keep its promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from played import FULL, IDLE, Outbox, join, lose, report, say, submit, submitted, tokens, where

from minserve.controller.controller import Controller
from minserve.controller.flights import FlightHandle
from minserve.errors import InvalidSLOError, SLOUnattainableError
from minserve.planner.replica_load import ReplicaLoad
from minserve.request import FinishReason
from minserve.slo.objectives import SLO, OnUnattainable, Task
from minserve.slo.task_table import TaskOutcome

# A little to do: less budget is left than on an idle replica, but enough.
BUSIER = ReplicaLoad(prefill_tokens=2000, free_tokens=10**5, num_sequences=3)


def call(name: str = "a", *, finish: float = 1000.0, calls: int | None = 4, **more: object) -> SLO:
    return SLO(task=Task(id=name, finish=finish, calls=calls), **more)


def end(controller: Controller, handle: FlightHandle) -> None:
    """Let a request's replica bring its whole answer."""
    last = tokens(handle, 7, 8, 9, finish_reason=FinishReason.LENGTH)
    say(controller, where(controller, handle), last)


def run_call(controller: Controller, slo: SLO, **more: object) -> int:
    """Let a call come and go, and return its replica."""
    # Each task has a prefix of its own.
    handle = submit(controller, slo, cache_salt=slo.task.id, **more)
    number = where(controller, handle)
    end(controller, handle)
    return number


def test_calls_go_back_where_the_task_was_though_others_have_more_budget(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        homes = {}
        for name in "abc":
            homes[name] = run_call(controller, call(name))
            report(controller, homes[name], BUSIER)
        assert sorted(homes.values()) == [0, 1, 2]
        # Now each has something to do, and by budget alone all would go to one.
        report(controller, homes["a"], IDLE)
        for _ in range(2):
            for name in "bca":
                controller._dispatcher._placement._prefixes.forget(homes[name])
                assert run_call(controller, call(name)) == homes[name]
        sent = [one.request.task for one in submitted(outboxes[homes["b"]])]
        assert [(one.key.id, one.number) for one in sent] == [("b", 1), ("b", 2), ("b", 3)]

    run(test)


def test_a_home_that_cannot_keep_the_call_is_passed_over_and_forgotten(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        home = run_call(controller, call(ttft=1.0))
        report(controller, home, FULL)
        elsewhere = run_call(controller, call(ttft=1.0))
        assert elsewhere != home
        # The prefix is there now.
        report(controller, home, IDLE)
        report(controller, elsewhere, BUSIER)
        assert run_call(controller, call(ttft=1.0)) == elsewhere

    run(test)


def test_a_task_goes_on_elsewhere_when_its_replica_is_killed_between_calls(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        home = run_call(controller, call())
        lose(controller, home)
        second = submit(controller, call(), cache_salt="a")
        elsewhere = where(controller, second)
        assert elsewhere != home
        request = controller._dispatcher._flights[second.request_id].request
        assert request.task.number == 2
        assert request.task.remaining_s < 1000.0
        end(controller, second)
        # The lost one is back, idle and empty: the task stays where its prefix is now.
        join(controller, home)
        report(controller, elsewhere, BUSIER)
        assert run_call(controller, call()) == elsewhere

    run(test)


def test_a_call_whose_replica_is_killed_stays_the_same_call(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller, call())
        home = where(controller, handle)
        say(controller, home, tokens(handle, 7, 8))
        lose(controller, home)
        elsewhere = where(controller, handle)
        assert elsewhere != home
        tasks = [submitted(outboxes[number])[0].request.task for number in (home, elsewhere)]
        assert tasks[0] == tasks[1]
        end(controller, handle)
        again = submit(controller, call())
        assert where(controller, again) == elsewhere
        assert controller._dispatcher._flights[again.request_id].request.task.number == 2

    run(test)


def test_tasks_are_counted_once_for_all_replicas(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        for _ in range(2):
            run_call(controller, call(calls=2))
        assert controller.task_outcomes[TaskOutcome.ATTAINED] == 1
        # A client that leaves has made no call.
        for _ in range(3):
            submit(controller, call("b", calls=1)).abort()
        run_call(controller, call("b", calls=1))
        assert controller.task_outcomes[TaskOutcome.ATTAINED] == 2

    run(test)


def test_another_budget_is_refused_before_anything_is_sent(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        run_call(controller, call())
        sent = [len(outbox.sent) for outbox in outboxes]
        with pytest.raises(InvalidSLOError, match=r"slo\.task\.calls"):
            submit(controller, call(calls=5), cache_salt="a")
        # The same id of another client is another task.
        with pytest.raises(InvalidSLOError, match=r"slo\.task\.finish_ms"):
            submit(controller, call(finish=9.0), cache_salt="a")
        assert [len(outbox.sent) for outbox in outboxes] == sent
        submit(controller, call(finish=9.0), cache_salt="a", client="other")

    run(test)


def test_a_task_that_is_late_is_refused_where_it_asks_for_that(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        late = call(finish=1e-6, on_unattainable=OnUnattainable.REJECT)
        first = submit(controller, late)
        end(controller, first)
        sent = sum(len(outbox.sent) for outbox in outboxes)
        with pytest.raises(SLOUnattainableError, match="cannot be in time") as caught:
            submit(controller, late)
        assert caught.value.reason == "task"
        assert sum(len(outbox.sent) for outbox in outboxes) == sent
        # Without that wish it is served, and nothing is promised.
        submit(controller, call(finish=1e-6))
        newest = max(
            (one for outbox in outboxes for one in submitted(outbox)),
            key=lambda one: one.request.arrival_s,
        )
        assert newest.request.task.given_up
        assert newest.request.targets.finish_s == 0.0
        assert controller.task_outcomes[TaskOutcome.LATE] == 1

    run(test)
