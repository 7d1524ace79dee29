"""`TaskCall`: one call of an agent's task, as its request carries it to whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# The prefix of a call is held for at most so many seconds, however long its task may take.
MOST_HOLD_S = 600.0


class TaskKey(NamedTuple):
    """What tells tasks apart: clients, and the salts of one client, cannot touch each other's.

    Attributes:
        client: who sends it, such as the number of an API key; empty where nobody is told apart.
        salt: the call's ``cache_salt``.
        id: the client's name for the task.
    """

    client: str
    salt: str
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCall:
    """A call and its task as they stood when the call arrived.

    Attributes:
        number: of the call in its task, from 1.
        calls: the calls that the client expects; ``None`` if it did not say.
        remaining_s: seconds from the call's arrival to the task's deadline; negative if that has
            passed.
        finish_s: seconds from the call's arrival after which the task's later calls would have too
            little time. 0 if the task was given up.
        aim_s: seconds from the call's arrival in which it is planned to be complete, so that the
            later calls have time to spare; at most ``finish_s``.
        weight: its worth as a multiple of a first call's.
        given_up: the task cannot be in time, so that nothing is promised to it any more.
    """

    key: TaskKey
    number: int
    calls: int | None
    remaining_s: float
    finish_s: float
    aim_s: float
    weight: int = 1
    given_up: bool = False

    @property
    def is_last(self) -> bool:
        """True if the client expects no further call."""
        return self.calls is not None and self.number >= self.calls

    def held_until(self, arrival_s: float, now: float) -> float | None:
        """Return until when the next call may come, for which this call's prefix is to be kept.

        Args:
            arrival_s: when this call arrived.
            now: when it has ended, on the same clock.

        Returns:
            ``None`` where no next call is expected in time.
        """
        until = min(arrival_s + self.remaining_s, now + MOST_HOLD_S)
        return None if self.is_last or self.given_up or until <= now else until


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """How a task stands at the end of one of its calls.

    Attributes:
        call: the call's number, from 1.
        calls: the calls that the client expects; ``None`` if it did not say.
        remaining_s: seconds to the task's deadline; negative if that has passed.
        given_up: the task cannot be in time.
    """

    id: str
    call: int
    calls: int | None
    remaining_s: float
    given_up: bool


def report_task(call: TaskCall, took_s: float) -> TaskReport:
    """Return how a task stands.

    Args:
        took_s: seconds since the call arrived.
    """
    remaining_s = call.remaining_s - took_s
    return TaskReport(
        id=call.key.id,
        call=call.number,
        calls=call.calls,
        remaining_s=remaining_s,
        given_up=call.given_up or remaining_s < 0,
    )
