"""`Launch`: a batch handed to a runner. Where it fails, it finds out whose error that is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from minserve.engine.batch import BatchRunner, RunningBatch, RunResult, Scheduled
from minserve.errors import DeviceLostError

log = logging.getLogger(__name__)

# What a batch gave by sequence id, or the error that the sequence met.
Results = Mapping[str, RunResult | Exception]


class Launch:
    """Hands a batch to a runner; an error of that is told with the results.

    Attributes:
        failed: True if the runner has not taken the batch.
    """

    def __init__(self, runner: BatchRunner, batch: SequenceOf[Scheduled]) -> None:
        self._runner, self._batch = runner, batch
        self._running: RunningBatch | Exception
        try:
            self._running = runner.launch(batch)
        except Exception as error:
            self._running = error

    @property
    def failed(self) -> bool:
        return isinstance(self._running, Exception)

    def results(self) -> Results:
        """Wait for the batch; where it fails, run each of its sequences alone.

        Raises:
            DeviceLostError: if the error belongs to no sequence: the device runs nothing any more.
        """
        try:
            if isinstance(self._running, Exception):
                raise self._running
            return self._running.results()
        except Exception as error:
            if self._runner.is_lost:
                raise DeviceLostError(
                    f"{self._runner.device} runs nothing any more; restart the process ({error})"
                ) from error
            if len(self._batch) == 1:
                log.exception("running %s failed", self._batch[0].seq)
                return {self._batch[0].seq.seq_id: error}
            log.warning("a batch failed (%s); running its sequences one by one", error)
            alone: dict[str, RunResult | Exception] = {}
            for item in self._batch:
                alone.update(Launch(self._runner, [item]).results())
            return alone
