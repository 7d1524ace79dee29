"""`ThreadCount` chooses how many threads share a pass on a CPU: at most as many as cores are idle.

Threads that share a pass wait for each other behind every operation. One that has to share
its core with another program holds up all of them, hundreds of times a pass: on two
cores beside one busy program two threads take many times as long as one
(bench/neighbours.py). So the machine is looked at now and then, and threads are left out
while others are busy on their cores.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

log = logging.getLogger(__name__)

# Seconds between two looks. The system counts in hundredths of a second.
LOOK_S = 0.25
# A core that others use for less than this share of the time is as good as idle.
NEGLIGIBLE = 0.4


class Usage(NamedTuple):
    """Processor time up to a moment, in seconds.

    Attributes:
        at: the moment, on a monotonic clock.
        busy: the time of all programs, over the processors that this process may run on.
        own: the time of this process.
    """

    at: float
    busy: float
    own: float

    @classmethod
    def look(cls) -> Usage:
        """Return the usage up to now."""
        processors = psutil.cpu_times(percpu=True)
        if hasattr(os, "sched_getaffinity"):
            allowed = os.sched_getaffinity(0)
            processors = [one for i, one in enumerate(processors) if i in allowed]
        # A guest's time is a part of its user time.
        idle = ("idle", "iowait", "guest", "guest_nice")
        busy = sum(
            value for one in processors for name, value in one._asdict().items() if name not in idle
        )
        return cls(time.monotonic(), busy, time.process_time())


class ThreadCount:
    """Chooses the threads of each pass; call it from the thread that runs them.

    Args:
        most: the threads of a pass that is alone on the machine.
        cores: the number of cores that this process may run on.
        look: tells the machine's usage.
        adapts: false keeps the number, whatever else runs.

    It sets torch's number for the thread that calls, which stays so after the pass.

    Attributes:
        now: the number of threads that passes have at the moment.
    """

    def __init__(
        self,
        most: int,
        cores: int,
        look: Callable[[], Usage] = Usage.look,
        *,
        adapts: bool = True,
    ) -> None:
        self.most = self.now = self._fitting = most
        self.cores = cores
        self._look = look
        self._last = self._usage() if adapts else None

    def before_pass(self) -> None:
        """Set torch's threads for the next pass. Each look takes a tenth of a millisecond."""
        last = self._last
        if self.most > 1 and last is not None and time.monotonic() - last.at >= LOOK_S:
            self._last = self._usage()
            if self._last is not None:
                fitting = num_fitting(self.most, self.cores, last, self._last)
                # Fewer at once, more when two looks agree: at the border it would swing.
                self.now = min(fitting, max(self.now, self._fitting))
                self._fitting = fitting
        torch.set_num_threads(self.now)

    def _usage(self) -> Usage | None:
        """Return the machine's usage; ``None`` from then on where the system does not tell it."""
        try:
            return self._look()
        except (OSError, psutil.Error) as error:
            log.warning(
                "passes keep %d threads whatever else runs: processor times cannot be read (%s)",
                self.now,
                error,
            )
            return None


def num_fitting(most: int, cores: int, before: Usage, after: Usage) -> int:
    """Return for how many of so many threads other programs leave a core; at least one.

    Threads beyond the cores were asked for on purpose, and stay.
    """
    others = (after.busy - before.busy) - (after.own - before.own)
    taken = others / (after.at - before.at) - max(0, cores - most)
    return min(most, max(1, most - max(0, math.ceil(taken - NEGLIGIBLE))))
