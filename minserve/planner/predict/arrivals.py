"""`ArrivalSlack`: how long a batch may be if only requests wait for it that are still to come."""

from __future__ import annotations

import math
from collections import deque

from minserve.planner.predict.pacing import Paces
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Sequence

# Requests that come are taken to be like the last ones that came.
WINDOW = 64
# For so long it is remembered that requests in a hurry came, however many others came since.
REMEMBERED_S = 600.0


class ArrivalSlack:
    """The time that the most urgent of recent arrivals could have waited before its prefill."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        # Of those in a hurry: when they came, and how long they could have waited.
        self._hurried: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    @property
    def least_s(self) -> float:
        """The least slack of the last arrivals in seconds; inf if none of them was in a hurry."""
        return min(self._recent, default=math.inf)

    def least_remembered_s(self, now: float) -> float:
        """Return the least slack in seconds of the last arrivals that were in a hurry; inf if none
        came for `REMEMBERED_S` seconds.
        """
        while self._hurried and self._hurried[0][0] < now - REMEMBERED_S:
            self._hurried.popleft()
        return min((slack_s for _, slack_s in self._hurried), default=math.inf)

    def see(self, seq: Sequence, paces: Paces, model: PerfModel, now: float) -> None:
        """Note a sequence that has arrived.

        Args:
            paces: what deadlines of whole outputs ask for.
        """
        slack_s = math.inf
        if seq.progress is not None:
            wait_s = paces.due_s(seq) - seq.request.arrival_s
            alone_s = model.drift * model.zero_load_prefill_s(seq.num_prompt_tokens)
            # Who would be late at once cannot be made so by waiting.
            slack_s = wait_s - alone_s if wait_s > alone_s else math.inf
        self._recent.append(slack_s)
        if slack_s < math.inf:
            self._hurried.append((now, slack_s))
