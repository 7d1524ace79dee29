"""`Launch`: a batch handed to a runner. Where it fails, its innocent sequences run all the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import cast

from minserve.engine.batch import (
    BatchRunner,
    FollowingBatch,
    FollowingRunner,
    RunningBatch,
    RunResult,
    Scheduled,
)
from minserve.engine.recovery import is_out_of_memory, recover
from minserve.errors import DeviceLostError

log = logging.getLogger(__name__)

# What a batch gave by sequence id, or the error that the sequence met.
Results = Mapping[str, RunResult | Exception]


class Launch:
    """Hands a batch to a runner; an error of that is told with the results.

    Args:
        behind: the batch before, where that still runs: then `sample` is to be called when it has
            been applied.

    Attributes:
        failed: True if the runner has not taken the batch.
        failure: why the batch as a whole failed, ``out_of_memory`` or ``error``; ``None`` as long as
            it did not.
    """

    def __init__(
        self, runner: BatchRunner, batch: SequenceOf[Scheduled], behind: Launch | None = None
    ) -> None:
        self._runner, self._batch = runner, batch
        self._running: RunningBatch | Exception
        self.failure: str | None = None
        try:
            if behind is None:
                self._running = runner.launch(batch)
            else:
                assert not isinstance(behind._running, Exception), "nothing follows a failure"
                self._running = cast("FollowingRunner", runner).follow(batch, behind._running)
        except Exception as error:
            self._running = error

    @property
    def failed(self) -> bool:
        return isinstance(self._running, Exception)

    def sample(self, batch: SequenceOf[Scheduled]) -> None:
        """Choose tokens for a batch that was launched behind another one.

        Args:
            batch: as for `FollowingBatch.sample`.
        """
        self._batch = batch
        if not isinstance(self._running, Exception):
            try:
                cast("FollowingBatch", self._running).sample(batch)
            except Exception as error:
                self._running = error

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
        if len(self._batch) > 1 and not isinstance(error, DeviceLostError):
            log.warning("a batch of %d failed (%s); it runs in parts", len(self._batch), error)
        return recover(self._runner, self._batch, error)
