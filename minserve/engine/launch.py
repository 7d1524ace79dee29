"""`Launch`: a batch handed to a runner. Where it fails, its innocent sequences run all the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from minserve.engine.batch import BatchRunner, RunningBatch, RunResult, Scheduled
from minserve.engine.recovery import is_out_of_memory, recover

log = logging.getLogger(__name__)

# What a batch gave by sequence id, or the error that the sequence met.
Results = Mapping[str, RunResult | Exception]


class Launch:
    """Hands a batch to a runner; an error of that is told with the results.

    Attributes:
        failed: True if the runner has not taken the batch.
        failure: why the batch as a whole failed, ``out_of_memory`` or ``error``; ``None`` as long as
            it did not.
    """

    def __init__(self, runner: BatchRunner, batch: SequenceOf[Scheduled]) -> None:
        self._runner, self._batch = runner, batch
        self._running: RunningBatch | Exception
        self.failure: str | None = None
        try:
            self._running = runner.launch(batch)
        except Exception as error:
            self._running = error

    @property
    def failed(self) -> bool:
        return isinstance(self._running, Exception)

    def results(self) -> Results:
        """Wait for the batch; where it fails, run it in parts (`minserve.engine.recovery`).

        Raises:
            DeviceLostError: if the error belongs to no sequence: the device runs nothing any more.
        """
        if isinstance(self._running, Exception):
            error = self._running
        else:
            try:
                return self._running.results()
            except Exception as caught:
                error = caught
        self.failure = "out_of_memory" if is_out_of_memory(error) else "error"
        if len(self._batch) > 1:
            log.warning("a batch of %d failed (%s); it runs in parts", len(self._batch), error)
        return recover(self._runner, self._batch, error)
