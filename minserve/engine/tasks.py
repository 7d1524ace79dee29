"""`Tasks`: joins requests to the tasks that they are calls of, and hears of their ends.

An intake has one, for a single engine or for all replicas of a controller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from minserve.errors import SLOUnattainableError
from minserve.outputs import OutputDelta
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Request
from minserve.slo.task_call import TaskKey
from minserve.slo.task_table import TaskTable


class Tasks:
    """The tasks of an intake.

    Args:
        clock: tells monotonic seconds, as in the requests' arrivals.
        find_model: returns the device's speed; ``None`` while it is unknown.

    Attributes:
        table: the tasks that live.
    """

    def __init__(
        self, clock: Callable[[], float], find_model: Callable[[], PerfModel | None]
    ) -> None:
        self._clock, self._find_model = clock, find_model
        self.table = TaskTable()

    def join(self, requests: SequenceOf[Request], client: str = "") -> list[Request]:
        """Return the requests of one call with the time that its task leaves them.

        Each of them must get a `watch`, which hears of its outputs.

        Args:
            requests: with one SLO; without a task in it they stay as they are.
            client: whose they are: ids of tasks are told apart by it, and by the cache salt.

        Raises:
            InvalidSLOError: if the task began with another budget.
            SLOUnattainableError: if the task was given up and the call asks to be refused then.
        """
        first = requests[0] if requests else None
        if first is None or first.slo is None or first.slo.task is None:
            return list(requests)
        slo, task = first.slo, first.slo.task
        call = self.table.begin(
            TaskKey(client, first.cache_salt, task.id),
            task,
            slo.name,
            first.arrival_s,
            self._expected_s(first),
            len(requests),
        )
        if call.given_up and slo.refuses_delay:
            self.table.cancel(call, self._clock())
            raise SLOUnattainableError(
                "the task of this call cannot be in time any more, so that all of its calls are "
                "refused; allow another task more time, or set on_unattainable to best_effort",
                reason="task",
                retry_after_s=math.inf,
            )
        return [one.in_task(call) for one in requests]

    def watch(self, request: Request) -> TaskWatch:
        """Return what has to hear of all deltas of a request."""
        return TaskWatch(self, request)

    def _expected_s(self, request: Request) -> float | None:
        """Return the seconds of decode on the idle device that the client's guess stands for."""
        tokens = None if request.slo is None else request.slo.expected_output_tokens
        model = self._find_model()
        if tokens is None or model is None:
            return None
        return tokens * model.zero_load_decode_s(len(request.prompt_token_ids))

    def _work_s(self, request: Request, num_cached: int, num_tokens: int) -> float:
        """Return the seconds that a request takes on the idle device."""
        model, num_prompt = self._find_model(), len(request.prompt_token_ids)
        if model is None:
            return 0.0
        prefill_s = model.zero_load_prefill_s(max(1, num_prompt - num_cached))
        return prefill_s + num_tokens * model.zero_load_decode_s(num_prompt)


class TaskWatch:
    """Follows the outputs of a request, and tells the table of its task when all have ended."""

    def __init__(self, tasks: Tasks, request: Request) -> None:
        self._tasks, self._request = tasks, request
        self._num_open = request.params.n
        self._num_tokens = self._num_cached = 0

    def note(self, delta: OutputDelta) -> None:
        """Take news of an output."""
        if self._request.task is None or not self._num_open:
            return
        self._num_tokens += len(delta.token_ids)
        self._num_cached = max(self._num_cached, delta.num_cached_tokens)
        if delta.finish_reason is None:
            return
        if not delta.finish_reason.is_own_end:
            self.leave()
            return
        self._num_open -= 1
        if not self._num_open:
            each = self._num_tokens // self._request.params.n
            work_s = self._tasks._work_s(self._request, self._num_cached, each)
            self._tasks.table.end(self._request.task, self._tasks._clock(), work_s)

    def leave(self) -> None:
        """Note that the request ends here without its whole answer, unless it has ended before."""
        if self._request.task is not None and self._num_open:
            self._num_open = 0
            self._tasks.table.cancel(self._request.task, self._tasks._clock())
