"""`TaskTable`: the tasks that live, and the deadline that each of their calls gets.

A task's clock starts with the arrival of its first call::

    arrival ─call 1─► ──tool──► ─call 2─► ──tool──► ... ─last call─► deadline of the task
       └──────────────────────── finish ──────────────────────────────┘

Each call gets two deadlines (`task_experience`): it is planned to take a share of the time that
remains, and may take what leaves the calls behind it just enough. Times are seconds on one monotonic clock and are passed in. One table serves one
engine, or all replicas of a controller. What it keeps is bounded, whatever clients send.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from minserve.errors import InvalidSLOError
from minserve.slo.objectives import Task
from minserve.slo.task_call import TaskCall, TaskKey
from minserve.slo.task_experience import TaskExperience

MOST_TASKS = 10_000
MOST_EXPERIENCES = 1000
# The last calls of a task for whose tools it is remembered what they took.
MOST_TOOLS = 64
# A task is forgotten so many seconds after its deadline and its last call.
LINGER_S = 600.0


class TaskOutcome(Enum):
    """The outcome of a task, for metrics."""

    ATTAINED = "attained"
    LATE = "late"
    GIVEN_UP = "given_up"
    # It was in time until calls that were expected did not come.
    ABANDONED = "abandoned"


@dataclass(slots=True)
class _OpenCall:
    """A call that has not ended: the number of its requests that have not, and their work."""

    num_requests: int
    work_s: float = 0.0


@dataclass(slots=True)
class _LiveTask:
    """A task, with what became of its calls so far."""

    task: Task
    name: str
    due_s: float
    active_s: float
    num_done: int = 0
    open: dict[int, _OpenCall] = field(default_factory=dict)
    ended_s: float | None = None
    tools_s: list[float] = field(default_factory=list)
    outcome: TaskOutcome | None = None

    def next_number(self) -> int:
        """Return the number of a call that comes now: behind all that are open or have ended."""
        return max(max(self.open, default=0), self.num_done + len(self.open)) + 1

    def is_over(self, now: float) -> bool:
        """Return True if the task can be forgotten."""
        return not self.open and now > max(self.due_s, self.active_s) + LINGER_S


class TaskTable:
    """Keeps account of tasks.

    Args:
        most: number of tasks that are kept. Beyond it, the client with the most tasks loses
            the one that was silent for longest.

    Attributes:
        outcomes: number of tasks by outcome. A task counts once, as soon as its outcome is known.
    """

    def __init__(self, most: int = MOST_TASKS) -> None:
        self._most = most
        # By client, the task that was silent for longest first.
        self._tasks: dict[str, OrderedDict[TaskKey, _LiveTask]] = {}
        self._num_tasks = 0
        self._experiences: OrderedDict[tuple[str, str], TaskExperience] = OrderedDict()
        self.outcomes: Counter[TaskOutcome] = Counter(dict.fromkeys(TaskOutcome, 0))

    def __len__(self) -> int:
        return self._num_tasks

    def begin(
        self,
        key: TaskKey,
        task: Task,
        name: str,
        now: float,
        work_s: float | None = None,
        num_requests: int = 1,
    ) -> TaskCall:
        """Note that a call of a task has arrived, and return it with its share of the time.

        Each of its requests must be told to `end` or `cancel` later.

        Args:
            name: the class of the call. The first call's is the class of its task.
            now: the time of arrival.
            work_s: seconds that the call takes on the idle device; ``None`` if nobody knows.
            num_requests: number of requests that the call is made of.

        Raises:
            InvalidSLOError: if the task has another deadline or number of calls than it began with.
        """
        live = self._find(key, task, name, now)
        live.active_s = max(live.active_s, now)
        if live.ended_s is not None and not live.open and len(live.tools_s) < MOST_TOOLS:
            tool_s = max(0.0, now - live.ended_s)
            live.tools_s.append(tool_s)
            self._experience(key, live).tools_s.append(tool_s)
        number = live.next_number()
        # Calls beyond those that were said are worth as much as the last one, not more and more.
        place = number if task.calls is None else min(number, task.calls)
        num_later = None if task.calls is None else task.calls - place
        outlook = self._experience(key, live).outlook(work_s, num_later, place - 1, live.tools_s)
        remaining_s = live.due_s - now
        if live.outcome is None and outlook.is_hopeless(remaining_s):
            self._settle(live, TaskOutcome.LATE if remaining_s <= 0 else TaskOutcome.GIVEN_UP)
        given_up = remaining_s <= 0 or live.outcome is TaskOutcome.GIVEN_UP
        live.open[number] = _OpenCall(num_requests)
        return TaskCall(
            key=key,
            number=number,
            calls=task.calls,
            remaining_s=remaining_s,
            finish_s=0.0 if given_up else outlook.latest_s(remaining_s),
            aim_s=0.0 if given_up else outlook.aim_s(remaining_s),
            weight=outlook.weight,
            given_up=given_up,
        )

    def end(self, call: TaskCall, now: float, work_s: float) -> None:
        """Note that a request of a call has brought its whole answer.

        Args:
            work_s: seconds that the request takes on the idle device.
        """
        live, one = self._open(call)
        if live is None or one is None:
            return
        one.num_requests -= 1
        one.work_s = max(one.work_s, work_s)
        live.active_s = max(live.active_s, now)
        if one.num_requests:
            return
        del live.open[call.number]
        live.num_done += 1
        live.ended_s = now
        self._experience(call.key, live).calls_s.append(one.work_s)
        if now > live.due_s:
            self._settle(live, TaskOutcome.LATE)
        elif live.num_done == live.task.calls:
            self._settle(live, TaskOutcome.ATTAINED)

    def cancel(self, call: TaskCall, now: float) -> None:
        """Note that a request of a call has ended without its whole answer: refused, failed or
        aborted. The call does not count; the client may send it again.
        """
        live, one = self._open(call)
        if live is None or one is None:
            return
        live.active_s = max(live.active_s, now)
        del live.open[call.number]

    def _open(self, call: TaskCall) -> tuple[_LiveTask | None, _OpenCall | None]:
        own = self._tasks.get(call.key.client)
        live = None if own is None else own.get(call.key)
        return live, None if live is None else live.open.get(call.number)

    def _find(self, key: TaskKey, task: Task, name: str, now: float) -> _LiveTask:
        """Return a live task, or begin it."""
        self._forget_old(key.client, now)
        own = self._tasks.setdefault(key.client, OrderedDict())
        live = own.get(key)
        if live is not None and live.is_over(now):
            self._forget(key)
            own, live = self._tasks.setdefault(key.client, OrderedDict()), None
        if live is None:
            live = _LiveTask(task, name, due_s=now + task.finish, active_s=now)
            own[key] = live
            self._num_tasks += 1
            if self._num_tasks > self._most:
                self._forget_one(key)
        else:
            _check_same(live.task, task)
            own.move_to_end(key)
        return live

    def _forget_old(self, client: str, now: float) -> None:
        """Forget the tasks of a client that are over, as far as they were silent for longest."""
        own: Mapping[TaskKey, _LiveTask] = self._tasks.get(client, {})
        over = []
        for key, live in own.items():
            if not live.is_over(now):
                break
            over.append(key)
        for key in over:
            self._forget(key)

    def _forget_one(self, newest: TaskKey) -> None:
        """Forget a task of the client that has most of them."""
        own = max(self._tasks.values(), key=len)
        idle = (key for key, live in own.items() if not live.open and key != newest)
        self._forget(next(idle, next(iter(own))))

    def _forget(self, key: TaskKey) -> None:
        own = self._tasks[key.client]
        live = own.pop(key)
        self._num_tasks -= 1
        if not own:
            del self._tasks[key.client]
        if live.num_done:
            self._experience(key, live).counts.append(live.num_done)
        in_time = live.ended_s is not None and live.task.calls is None
        self._settle(live, TaskOutcome.ATTAINED if in_time else TaskOutcome.ABANDONED)

    def _settle(self, live: _LiveTask, outcome: TaskOutcome) -> None:
        if live.outcome is None:
            live.outcome = outcome
            self.outcomes[outcome] += 1

    def _experience(self, key: TaskKey, live: _LiveTask) -> TaskExperience:
        """Return what is known of a client's tasks of this class."""
        of = (key.client, live.name)
        experience = self._experiences.get(of)
        if experience is None:
            experience = self._experiences[of] = TaskExperience()
            if len(self._experiences) > MOST_EXPERIENCES:
                self._experiences.popitem(last=False)
        return experience


def _check_same(began: Task, now: Task) -> None:
    """Check that a call has the budget with which its task began.

    Raises:
        InvalidSLOError: naming the field that differs.
    """
    hint = "a task keeps the budget of its first call; give another task another id"
    if now.finish != began.finish:
        raise InvalidSLOError(
            f"slo.task.finish_ms: this task began with {1e3 * began.finish:g} ms; {hint}",
            "slo.task.finish_ms",
        )
    if now.calls != began.calls:
        said = "no number of calls" if began.calls is None else f"{began.calls} calls"
        raise InvalidSLOError(
            f"slo.task.calls: this task began with {said}; {hint}", "slo.task.calls"
        )
