"""The table of tasks against plain accounts of the same calls."""

from __future__ import annotations

import math
import random

import pytest

from minserve.errors import InvalidSLOError
from minserve.slo import task_experience
from minserve.slo.objectives import Task
from minserve.slo.task_call import MOST_HOLD_S, TaskCall, TaskKey, report_task
from minserve.slo.task_experience import AIM, ENOUGH, WINDOW, TaskExperience, TaskOutlook
from minserve.slo.task_table import LINGER_S, TaskOutcome, TaskTable


def key(name: str, client: str = "", salt: str = "") -> TaskKey:
    return TaskKey(client, salt, name)


def task(name: str = "a", finish: float = 10.0, calls: int | None = 4) -> Task:
    return Task(id=name, finish=finish, calls=calls)


def run_task(
    table: TaskTable, name: str, calls: int, call_s: float, tool_s: float, at: float = 0.0
) -> float:
    """Let a task run whose calls and tools always take the same time; return its end."""
    one = task(name, finish=1000.0, calls=calls)
    for number in range(calls):
        call = table.begin(key(name), one, "agent", at)
        assert call.number == number + 1
        at += call_s
        table.end(call, at, call_s)
        at += tool_s
    return at - tool_s


@pytest.fixture
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are planned to take all of their share."""
    monkeypatch.setattr(task_experience, "AIM", 1.0)


@pytest.mark.usefixtures("no_reserve")
@pytest.mark.parametrize("num_calls", [1, 2, 5])
@pytest.mark.parametrize("finish", [20.0, 60.0])
@pytest.mark.parametrize("deadline", ["aim_s", "finish_s"])
def test_calls_that_take_all_they_may_end_at_the_deadline(num_calls, finish, deadline):
    table = TaskTable()
    for number in range(ENOUGH):
        run_task(table, f"before{number}", 3, call_s=2.0, tool_s=1.0)
    now, one = 5000.0, task(finish=finish, calls=num_calls)
    began = now
    for number in range(num_calls):
        call = table.begin(key("a"), one, "agent", now)
        assert (call.number, call.remaining_s) == (number + 1, began + finish - now)
        assert not call.given_up
        assert 0 < call.aim_s <= call.finish_s
        now += getattr(call, deadline)
        table.end(call, now, 2.0)
        now += 1.0
    assert now - 1.0 == pytest.approx(began + finish)
    assert table.outcomes[TaskOutcome.ATTAINED] == ENOUGH + 1


@pytest.mark.usefixtures("no_reserve")
def test_time_that_a_call_saves_or_wastes_goes_to_all_calls_behind_it():
    table = TaskTable()
    run_task(table, "before", 9, call_s=1.0, tool_s=0.0)
    for took_s in (1.0, 6.0):
        name = f"took {took_s}"
        first = table.begin(key(name), task(name, 12.0, 4), "agent", 100.0)
        assert first.aim_s == pytest.approx(3.0)
        table.end(first, 100.0 + took_s, 1.0)
        second = table.begin(key(name), task(name, 12.0, 4), "agent", 100.0 + took_s)
        assert second.aim_s == pytest.approx((12.0 - took_s) / 3)


@pytest.mark.usefixtures("no_reserve")
def test_shares_follow_the_work_of_calls_and_leave_tools_their_time():
    rng = random.Random(1)
    for _ in range(200):
        outlook = TaskOutlook(
            own_s=rng.uniform(0.1, 5),
            call_s=rng.uniform(0.1, 5),
            tool_s=rng.uniform(0, 5),
            num_later=rng.randrange(6),
        )
        remaining_s = rng.uniform(0.1, 60)
        share_s = outlook.aim_s(remaining_s)
        # Every other share of the same stretch is found by halving: it fits, and nothing is left.
        low, high = 0.0, remaining_s / outlook.own_s
        enough = remaining_s >= outlook.needed_s
        for _ in range(100):
            stretch = (low + high) / 2
            tools_s = outlook.tool_s * (1.0 if enough else stretch)
            total_s = stretch * outlook.own_s + outlook.num_later * (
                stretch * outlook.call_s + tools_s
            )
            low, high = (stretch, high) if total_s <= remaining_s else (low, stretch)
        assert share_s == pytest.approx(low * outlook.own_s, rel=1e-6)


def test_a_call_is_planned_to_leave_a_reserve_and_may_take_it():
    outlook = TaskOutlook(own_s=2.0, call_s=1.0, tool_s=3.0, num_later=2, num_done=1)
    # 14 s for calls, of which half by work: 7 s, and so 5 s more than its work.
    assert outlook.aim_s(20.0) == pytest.approx(2.0 + AIM * 5.0)
    assert outlook.latest_s(20.0) == pytest.approx(20.0 - 2 * (1.0 + 3.0))
    # Where less is left than the work needs, there is nothing to reserve.
    assert outlook.aim_s(5.0) == outlook.latest_s(5.0) == pytest.approx(1.0)
    last = TaskOutlook(own_s=2.0, call_s=1.0, tool_s=3.0, num_later=0, num_done=3)
    assert last.latest_s(20.0) == 20.0
    # While nobody knows what later calls need, each gets as much as the others.
    unknown = TaskOutlook(own_s=0.0, call_s=0.0, tool_s=0.0, num_later=3)
    assert unknown.latest_s(20.0) == 5.0


def test_calls_weigh_more_the_fewer_are_missing():
    weights = [TaskOutlook(own_s=1.0, call_s=1.0, tool_s=0.0, num_later=3 - done, num_done=done).weight
               for done in range(4)]  # fmt: skip
    assert weights == [1, 1, 2, 4]
    assert TaskOutlook(own_s=1.0, call_s=1.0, tool_s=0.0, num_later=0).weight == 1


@pytest.mark.usefixtures("no_reserve")
def test_a_task_learns_what_its_own_tools_take():
    table = TaskTable()
    run_task(table, "before", 20, call_s=1.0, tool_s=0.0)
    one, now = task("slow", 100.0, 10), 1000.0
    tools = []
    for _ in range(6):
        call = table.begin(key("slow"), one, "agent", now)
        for_tools_s = call.remaining_s - (10 - call.number + 1) * call.aim_s
        tools.append(for_tools_s / (10 - call.number))
        table.end(call, now + 1.0, 1.0)
        now += 6.0
    assert tools[0] == pytest.approx(0.0)
    assert tools == sorted(tools)
    assert 3.0 < tools[-1] < 5.0


class Accounts:
    """Every task that ever was, in a list, without bounds."""

    def __init__(self) -> None:
        self.tasks: dict[TaskKey, list] = {}

    def begin(self, of: TaskKey, one: Task, now: float):
        known = self.tasks.get(of)
        if known is not None:
            asked, began, _, open_, active = known
            if not open_ and now > max(began + asked.finish, active) + LINGER_S:
                known = None
            elif (asked.finish, asked.calls) != (one.finish, one.calls):
                return None
        if known is None:
            known = self.tasks[of] = [one, now, 0, set(), now]
        number = max([known[2] + len(known[3]), *known[3]]) + 1
        known[3].add(number)
        known[4] = now
        return number, known[1] + one.finish - now

    def close(self, call: TaskCall, now: float, whole: bool) -> None:
        known = self.tasks[call.key]
        known[3].remove(call.number)
        known[2] += whole
        known[4] = now


@pytest.mark.parametrize("seed", range(5))
def test_calls_are_numbered_and_timed_as_in_plain_accounts(seed):
    rng, table, accounts = random.Random(seed), TaskTable(), Accounts()
    now, open_calls = 0.0, []
    for _ in range(800):
        now += rng.choice((0.0, 0.5, 30.0, LINGER_S if rng.random() < 0.05 else 1.0))
        if open_calls and rng.random() < 0.5:
            call = open_calls.pop(rng.randrange(len(open_calls)))
            whole = rng.random() < 0.8
            (table.end(call, now, 1.0) if whole else table.cancel(call, now))
            accounts.close(call, now, whole)
            continue
        of = key(rng.choice("abc"), rng.choice(("", "0")), rng.choice(("", "salt")))
        one = Task(id=of.id, finish=rng.choice((20.0, 20.0, 40.0)), calls=rng.choice((3, None)))
        expected = accounts.begin(of, one, now)
        if expected is None:
            with pytest.raises(InvalidSLOError, match=r"slo\.task\."):
                table.begin(of, one, "agent", now)
            continue
        call = table.begin(of, one, "agent", now)
        assert (call.number, call.remaining_s) == (expected[0], pytest.approx(expected[1]))
        assert 0 <= call.aim_s <= call.finish_s <= max(call.remaining_s, 0.0)
        assert call.given_up or call.finish_s > 0
        assert call.given_up >= (call.remaining_s <= 0)
        open_calls.append(call)


def test_a_slow_call_does_not_hold_back_the_numbers_of_those_beside_it():
    table, one = TaskTable(), task(calls=5)
    slow = table.begin(key("a"), one, "agent", 0.0)
    for number in range(2, 5):
        beside = table.begin(key("a"), one, "agent", 1.0)
        assert (beside.number, beside.is_last) == (number, False)
        table.end(beside, 2.0, 1.0)
    last = table.begin(key("a"), one, "agent", 2.0)
    assert (slow.number, last.number, last.is_last) == (1, 5, True)


def test_calls_beyond_those_that_were_said_weigh_no_more_than_the_last_one():
    table, one = TaskTable(), task(calls=2)
    weights = [table.begin(key("a"), one, "agent", 0.0).weight for _ in range(20)]
    assert weights == [1] + [2] * 19


def test_another_budget_names_its_field():
    table = TaskTable()
    table.begin(key("a"), task(finish=10.0, calls=4), "agent", 0.0)
    for other, field in (
        (task(finish=11.0, calls=4), "slo.task.finish_ms"),
        (task(finish=10.0, calls=5), "slo.task.calls"),
        (task(finish=10.0, calls=None), "slo.task.calls"),
    ):
        with pytest.raises(InvalidSLOError, match=field) as caught:
            table.begin(key("a"), other, "agent", 1.0)
        assert caught.value.param == field
    # The refused calls have left no trace.
    assert table.begin(key("a"), task(), "agent", 1.0).number == 2


def test_equal_ids_of_other_clients_or_salts_are_other_tasks():
    table = TaskTable()
    for number, of in enumerate((key("a"), key("a", "1"), key("a", "", "s"))):
        call = table.begin(of, task(finish=10.0 + number), "agent", float(number))
        assert (call.number, call.remaining_s) == (1, 10.0 + number)


def test_a_call_that_failed_does_not_count():
    table = TaskTable()
    refused = table.begin(key("a"), task(), "agent", 0.0)
    table.cancel(refused, 1.0)
    again = table.begin(key("a"), task(), "agent", 2.0)
    assert (again.number, again.remaining_s) == (1, 8.0)


def test_a_call_of_several_requests_ends_with_the_last_of_them():
    table = TaskTable()
    call = table.begin(key("a"), task(calls=2), "agent", 0.0, num_requests=2)
    table.end(call, 1.0, 1.0)
    beside = table.begin(key("a"), task(calls=2), "agent", 1.5)
    assert beside.number == 2
    table.end(call, 2.0, 1.0)
    assert table.outcomes[TaskOutcome.ATTAINED] == 0
    table.end(beside, 3.0, 1.0)
    assert table.outcomes[TaskOutcome.ATTAINED] == 1


def test_a_hopeless_task_is_given_up_as_a_whole():
    table = TaskTable()
    run_task(table, "before", 2 * ENOUGH, call_s=2.0, tool_s=1.0)
    one, now = task("a", finish=20.0, calls=4), 1000.0
    first = table.begin(key("a"), one, "agent", now)
    assert not first.given_up
    # Three more calls of 2 s, with their tools, need 8 s behind this one.
    table.end(first, now + 13.0, 2.0)
    second = table.begin(key("a"), one, "agent", now + 14.0)
    assert (second.given_up, second.finish_s) == (True, 0.0)
    # Even a fast second call does not bring it back.
    table.end(second, now + 14.1, 0.1)
    assert table.begin(key("a"), one, "agent", now + 14.2).given_up
    assert table.outcomes[TaskOutcome.GIVEN_UP] == 1
    # Another client has seen nothing of this, and its tasks are not judged by it.
    assert not table.begin(key("a", "other"), task("a", 5.0, 4), "agent", 0.0).given_up


def test_no_task_is_given_up_by_too_little_experience_or_without_a_number_of_calls():
    table = TaskTable()
    run_task(table, "before", ENOUGH - 1, call_s=2.0, tool_s=1.0)
    assert not table.begin(key("a"), task("a", 4.0, 9), "agent", 0.0).given_up
    run_task(table, "more", ENOUGH, call_s=2.0, tool_s=1.0)
    assert table.begin(key("b"), task("b", 4.0, 9), "agent", 0.0).given_up
    assert not table.begin(key("c"), task("c", 4.0, None), "agent", 0.0).given_up


def test_times_that_scatter_are_given_the_benefit_of_the_doubt():
    even, uneven = TaskExperience(), TaskExperience()
    even.calls_s.extend([2.0] * 10)
    uneven.calls_s.extend([0.5, 3.5] * 5)
    for experience, hopeless in ((even, True), (uneven, False)):
        assert experience.outlook(None, 3, 0, []).is_hopeless(7.0) is hopeless
        assert experience.outlook(None, 3, 0, []).is_hopeless(0.0)


def test_without_a_number_of_calls_earlier_tasks_tell_how_many_come():
    experience = TaskExperience()
    assert experience.outlook(1.0, None, 0, []).num_later == 1
    experience.counts.extend([2, 4, 9])
    for num_done in range(10):
        more = [count - num_done - 1 for count in (2, 4, 9) if count > num_done]
        expected = sum(more) / len(more) if more else 1
        assert experience.outlook(1.0, None, num_done, []).num_later == pytest.approx(expected)


def test_late_and_abandoned_tasks_are_counted_once():
    table = TaskTable()
    late = table.begin(key("late"), task("late", 1.0, 2), "agent", 0.0)
    table.end(late, 2.0, 1.0)
    assert table.begin(key("late"), task("late", 1.0, 2), "agent", 3.0).given_up
    gone = table.begin(key("gone"), task("gone", 1.0, 2), "agent", 0.0)
    table.end(gone, 0.5, 1.0)
    counted = table.begin(key("open"), task("open", 1.0, None), "agent", 0.0)
    table.end(counted, 0.5, 1.0)
    for call in (table.begin(key("late"), task("late", 1.0, 2), "agent", 4.0), late):
        table.cancel(call, 4.0)
    # What is over is forgotten when another call comes, and settled then.
    for number in range(5):
        now = 10 * (LINGER_S + 100) + number
        table.cancel(table.begin(key(f"z{number}"), task(f"z{number}"), "agent", now), now)
    assert table.outcomes == {
        TaskOutcome.ATTAINED: 1,
        TaskOutcome.LATE: 1,
        TaskOutcome.GIVEN_UP: 0,
        TaskOutcome.ABANDONED: 1,
    }


def test_the_table_is_bounded_and_a_flood_of_ids_costs_its_own_client():
    table = TaskTable(most=20)
    mine = [table.begin(key(f"m{i}", "me"), task(f"m{i}"), "agent", 0.0) for i in range(5)]
    for call in mine:
        table.end(call, 0.5, 0.5)
    for number in range(200):
        call = table.begin(key(f"f{number}", "flood"), task(f"f{number}"), "agent", 1.0)
        if number % 2:
            table.end(call, 1.0, 1.0)
        assert len(table) <= 20
    numbers = [table.begin(one.key, task(one.key.id), "agent", 2.0).number for one in mine]
    assert numbers == [2] * 5


@pytest.mark.usefixtures("no_reserve")
def test_experience_is_of_the_newest_tasks():
    table = TaskTable()
    run_task(table, "old", WINDOW, call_s=9.0, tool_s=9.0)
    run_task(table, "new", WINDOW + 1, call_s=1.0, tool_s=2.0)
    call = table.begin(key("a"), task("a", 26.0, 3), "agent", 10_000.0)
    assert call.aim_s == pytest.approx((26.0 - 2 * 2.0) / 3)


def test_prefixes_are_held_while_another_call_may_come_in_time():
    def call(**given) -> TaskCall:
        times = {"remaining_s": 50.0, "finish_s": 9.0, "aim_s": 5.0}
        return TaskCall(**{"key": key("a"), "number": 1, "calls": 2, **times, **given})

    assert call().held_until(100.0, 110.0) == 150.0
    assert call(calls=None).held_until(100.0, 110.0) == 150.0
    assert call(remaining_s=math.inf).held_until(100.0, 110.0) == 110.0 + MOST_HOLD_S
    for ended in (call(number=2), call(given_up=True), call(remaining_s=10.0)):
        assert ended.held_until(100.0, 110.0) is None


def test_a_report_tells_the_time_that_is_left():
    call = TaskCall(key=key("a"), number=2, calls=3, remaining_s=5.0, finish_s=2.0, aim_s=1.0)
    assert report_task(call, 4.0).remaining_s == pytest.approx(1.0)
    assert [report_task(call, took_s).given_up for took_s in (4.0, 6.0)] == [False, True]
