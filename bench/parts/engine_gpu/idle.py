"""`IdleMeter`: for how long a device has nothing to do between the pieces of work of a runner."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from minserve.engine.device.runner import ModelRunner

Mark = torch.cuda.Event | float


class IdleMeter:
    """Marks where each pass and each choice of tokens begins and ends on the device.

    A mark behind all that is queued is reached at once where nothing is, so that the time from the
    end of one piece to the beginning of the next is the time for which the device waited for the host.
    Without a GPU the marks are the host's own times.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._marks: list[tuple[Mark, Mark]] = []

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Take part in all that the runner launches."""
        launch = self._runner._launch

        def launching(*args: Any) -> Any:
            with self._piece():
                batch = launch(*args)
            sample = batch.sample

            def sampling(items: Any) -> None:
                with self._piece():
                    sample(items)

            batch.sample = sampling
            return batch

        self._runner._launch = launching  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._runner._launch

    def seconds(self) -> tuple[float, float]:
        """Return for how long the device was idle, and the time from the first mark to the last."""
        marks = self._marks
        if not marks:
            return 0.0, 0.0
        gaps = [self._between(end, begin) for (_, end), (begin, _) in pairwise(marks)]
        return sum(gaps), self._between(marks[0][0], marks[-1][1])

    @contextmanager
    def _piece(self) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks.append((begin, self._mark()))

    def _mark(self) -> Mark:
        if self._runner.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(one: Mark, other: Mark) -> float:
        if isinstance(one, float) or isinstance(other, float):
            return float(other) - float(one)  # type: ignore[arg-type]
        other.synchronize()
        return one.elapsed_time(other) / 1e3
