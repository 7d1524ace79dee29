"""`TaskTerms`: deadlines of whole tasks, each task being the calls of one conversation.

A task's deadline is a multiple of the time that it would take alone on the idle device, its
tools included. How much of that a server is told is another matter, and what is compared::

    whole     each call names its task: the server divides the time
    per-call  each call has an equal share of the time from the beginning, less what tools take
    classes   each call has the SLO of its class and knows of no task

Tasks are judged alike in all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minserve.errors import WorkloadError
from minserve.slo.attainment import ROUNDING_S
from minserve.slo.objectives import MAX_SLOWDOWN, SLO, Targets, Task
from minserve.workload.conversation import Conversation
from minserve.workload.turn_targets import Speed, targets_of

WHOLE, PER_CALL, CLASSES = WAYS = ("whole", "per-call", "classes")
SLOWDOWN = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTerms:
    """The deadlines of a workload's tasks.

    Attributes:
        way: what servers are told: ``whole``, ``per-call`` or ``classes``.
        slowdown: a task's deadline as a multiple of its time alone on the idle device.

    Raises:
        WorkloadError: for a value out of range.
    """

    way: str = WHOLE
    slowdown: float = SLOWDOWN

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise WorkloadError(f"no way {self.way!r} to tell of tasks; known: {', '.join(WAYS)}")
        if not 1 <= self.slowdown <= MAX_SLOWDOWN:
            raise WorkloadError(
                f"the slowdown of tasks must be at least 1 (an idle device), not {self.slowdown}"
            )

    def finish_s(self, conversation: Conversation, speed: Speed) -> float:
        """Return the seconds from a task's arrival to its deadline."""
        return self.slowdown * alone_s(conversation, speed)

    def promise(
        self, conversation: Conversation, number: int, speed: Speed, task_id: str
    ) -> tuple[SLO, Targets]:
        """Return what a call asks of a server.

        Args:
            number: of the call's turn, from 0.

        Returns:
            the SLO with the name of the turn's class, and its seconds. A call that names its task
            has none of its own.
        """
        turn = conversation.turns[number]
        if self.way == CLASSES:
            return turn.slo, targets_of(turn, speed)
        finish_s, num_calls = self.finish_s(conversation, speed), len(conversation.turns)
        if self.way == WHOLE:
            task = Task(id=task_id, finish=finish_s, calls=num_calls)
            return SLO(task=task, name=turn.slo.name), Targets()
        for_calls_s = finish_s - sum(one.delay_s for one in conversation.turns)
        share_s = for_calls_s / num_calls
        return SLO(finish=share_s, name=turn.slo.name), Targets(finish_s=share_s)


def alone_s(conversation: Conversation, speed: Speed) -> float:
    """Return the seconds of a task alone on the idle device, whose cache has all that was said."""
    return sum(
        turn.delay_s
        + speed.zero_load_prefill_s(turn.prompt_tokens - turn.shared_tokens)
        + (turn.output_tokens - 1) * speed.zero_load_decode_s(turn.prompt_tokens)
        for turn in conversation.turns
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVerdict:
    """The outcome of a task; times are in seconds.

    Attributes:
        arrival_s: time at which its first call was due, from the beginning of the workload.
        finish_s: time from there to its deadline.
        took_s: time from there to the last token of its last call; ``None`` if that did not come.
        num_calls: number of its calls.
        given_up: the server has said that the task could not be in time.
    """

    arrival_s: float
    finish_s: float
    took_s: float | None
    num_calls: int
    given_up: bool = False

    @property
    def attained(self) -> bool:
        return self.took_s is not None and self.took_s <= self.finish_s + ROUNDING_S


def task_field(task: Task) -> dict[str, Any]:
    """Return a task as a minserve reads it in the field ``slo``."""
    return {"task": {"id": task.id, "finish_ms": 1e3 * task.finish, "calls": task.calls}}
