"""`ArrivalSlack`: how long may a batch be where only those are kept waiting who are still to come?"""

from __future__ import annotations

import math
from collections import deque

from minserve.planner.perf_model import PerfModel
from minserve.request import Sequence

# Those that come are taken to be like the last ones that came.
WINDOW = 64


class ArrivalSlack:
    """How long the most urgent of recent arrivals could have waited before its prefill began."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    @property
    def least_s(self) -> float:
        """inf where nobody was in a hurry."""
        return min(self._recent, default=math.inf)

    def see(self, seq: Sequence, model: PerfModel) -> None:
        """A sequence has arrived."""
        targets = seq.request.targets
        slack_s = math.inf
        if targets is not None:
            alone_s = model.drift * model.zero_load_prefill_s(seq.num_prompt_tokens)
            # Who would be late at once cannot be made so by waiting.
            slack_s = targets.ttft_s - alone_s if targets.ttft_s > alone_s else math.inf
        self._recent.append(slack_s)
