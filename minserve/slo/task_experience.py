"""`TaskExperience`: what the calls and tools of tasks took lately, and what that says of others.

All of it is arithmetic on numbers that are passed in: seconds of work are those that a call takes
on the idle device, so that they do not grow with the load.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

# So many of the newest calls, tools and tasks are remembered.
WINDOW = 64
# A task's own tools count as much as those of others after so many of them.
OWN_TOOLS = 2.0
# Before so many calls were seen, no task is given up by what is expected of it.
ENOUGH = 8
# Of the time that a call has beside its work, it is planned to use so much. The rest is a reserve,
# for the call itself first, then for those behind it.
AIM = 0.25
# A task is given up when it needs less than expected by so many standard deviations, and that is
# still more than the time left: about one task in forty would have been in time.
SIGMAS = 2.0


def _window() -> deque[float]:
    return deque(maxlen=WINDOW)


@dataclass(slots=True)
class TaskExperience:
    """The newest calls, tools and tasks of one class.

    Attributes:
        calls_s: seconds of work of each call.
        tools_s: seconds from the end of a call to the next call of the same task.
        counts: number of calls of each task that has ended.
    """

    calls_s: deque[float] = field(default_factory=_window)
    tools_s: deque[float] = field(default_factory=_window)
    counts: deque[float] = field(default_factory=_window)

    def outlook(
        self,
        own_s: float | None,
        num_later: int | None,
        num_done: int,
        own_tools_s: Sequence[float],
    ) -> TaskOutlook:
        """Return what is expected of a task from the call that has just arrived.

        Args:
            own_s: seconds of work of this call; ``None`` if nobody knows.
            num_later: calls after this one; ``None`` if the client did not say.
            num_done: calls before this one.
            own_tools_s: seconds of the tools of this task.
        """
        call_s = _mean(self.calls_s)
        if call_s is None:
            call_s = own_s or 0.0
        tool_s = _mean(self.tools_s)
        if tool_s is None:
            tool_s = _mean(own_tools_s) or 0.0
        else:
            own = len(own_tools_s)
            tool_s = (OWN_TOOLS * tool_s + sum(own_tools_s)) / (OWN_TOOLS + own)
        return TaskOutlook(
            own_s=call_s if own_s is None else own_s,
            call_s=call_s,
            tool_s=tool_s,
            num_later=self._later(num_done + 1) if num_later is None else num_later,
            num_done=num_done,
            variance=_variance(self.calls_s) + _variance(self.tools_s),
            is_firm=num_later is not None and len(self.calls_s) >= ENOUGH,
        )

    def _later(self, number: int) -> float:
        """Return how many calls are expected after the call of this number: what tasks that came so
        far had on average, or else one.
        """
        more = [count - number for count in self.counts if count >= number]
        return statistics.fmean(more) if more else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutlook:
    """What a task will take from one of its calls on.

    Attributes:
        own_s: seconds of work of this call.
        call_s, tool_s: expected seconds of each later call, and of the tool before it.
        num_later: expected number of later calls.
        num_done: number of calls before this one.
        variance: of the seconds of a call and its tool together.
        is_firm: enough is known to give the task up by it.
    """

    own_s: float
    call_s: float
    tool_s: float
    num_later: float
    num_done: int = 0
    variance: float = 0.0
    is_firm: bool = False

    @property
    def needed_s(self) -> float:
        """The expected seconds to the task's end on an idle device."""
        return self.own_s + self.num_later * (self.call_s + self.tool_s)

    def is_hopeless(self, remaining_s: float) -> bool:
        """Return True if the task cannot be expected to end in the time that remains."""
        if remaining_s <= 0:
            return True
        if not self.is_firm:
            return False
        least_s = self.needed_s - SIGMAS * math.sqrt((1 + self.num_later) * self.variance)
        return least_s > remaining_s

    def aim_s(self, remaining_s: float) -> float:
        """Return the seconds that this call is planned to take: its work, and `AIM` of the rest of
        its share.

        Tools take the time that they take. What they leave is shared by the calls in proportion
        to their work. Where that is less than the work, tools give way in the same proportion.
        """
        share_s = self._share_s(remaining_s)
        return share_s if share_s < self.own_s else self.own_s + AIM * (share_s - self.own_s)

    def latest_s(self, remaining_s: float) -> float:
        """Return the seconds that this call may take at most, so that those behind it have just the
        time that they need on an idle device.
        """
        share_s = self._share_s(remaining_s)
        if self.call_s <= 0:
            return share_s  # nobody knows what they need
        return max(share_s, remaining_s - self.num_later * (self.call_s + self.tool_s))

    @property
    def weight(self) -> int:
        """What this call is worth, as a multiple of a first one: the fewer calls are missing, the
        less it takes to complete a task. A whole number, since the planner is exact with these.
        """
        return round((self.num_done + 1 + self.num_later) / (1 + self.num_later))

    def _share_s(self, remaining_s: float) -> float:
        if self.call_s <= 0 or self.own_s <= 0:
            own_s = call_s = 1.0
        else:
            own_s, call_s = self.own_s, self.call_s
        for_calls_s = remaining_s - self.num_later * self.tool_s
        in_turn = for_calls_s * own_s / (own_s + self.num_later * call_s)
        together = remaining_s * own_s / (own_s + self.num_later * (call_s + self.tool_s))
        return max(in_turn, together)


def _mean(values: Sequence[float] | deque[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _variance(values: deque[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = statistics.fmean(values)
    return statistics.fmean([(value - mean) ** 2 for value in values])
