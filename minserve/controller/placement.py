"""`Placement`: chooses the replica of each request with a router, and keeps the router informed.

The controller and the simulator place their requests with it. They differ in where they know cached
prefixes from (`Placement.cached_tokens`), and in how a request gets to its replica.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Generic, Protocol, TypeVar

from minserve.controller.router import NOBODY, Ask, Router
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.predict.pacing import PaceLimits, pace_before
from minserve.planner.replica_load import ReplicaLoad
from minserve.request import Request, Sequence
from minserve.slo.task_call import TaskKey


class Placeable(Protocol):
    """A request as a placement sees it.

    Attributes:
        tried: numbers of the replicas that could not promise its SLO.
    """

    tried: set[int]

    @property
    def request(self) -> Request:
        """The request; its arrival is on the clock of the placement."""

    @property
    def seq(self) -> Sequence:
        """One of its outputs, in the form that estimators of output lengths take."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the prompt and of the longest output so far."""

    @property
    def has_begun(self) -> bool:
        """True if it has a token, or an output that ended."""


Placed = TypeVar("Placed", bound=Placeable)

# Tasks whose replica is remembered; a task that is forgotten is placed like any request.
MOST_HOMES = 10_000


class Placement(ABC, Generic[Placed]):
    """Chooses replicas for requests.

    Args:
        lengths: guesses how long outputs are.
        hop_limit: number of times that a request may be moved on, while its replica promises it
            nothing and it has not begun.
        clock: seconds.
    """

    def __init__(
        self,
        router: Router,
        lengths: LengthEstimator,
        hop_limit: int,
        clock: Callable[[], float],
    ) -> None:
        self._router, self._lengths = router, lengths
        self._hop_limit, self._clock = hop_limit, clock
        # By task, the replica of its last call; the task that was silent for longest first.
        self._homes: OrderedDict[TaskKey, int] = OrderedDict()

    @abstractmethod
    def cached_tokens(self, one: Placed) -> Mapping[int, int]:
        """Return by replica the leading tokens of a request that it is believed to hold."""

    def report(self, number: int, load: ReplicaLoad, under_way: Iterable[Ask] = ()) -> None:
        """Give the router a replica's load.

        Args:
            under_way: the requests on their way to it, which the load does not include.
        """
        self._router.report(number, load)
        for ask in under_way:
            self._router.count_in(number, ask)

    def went_to(self, number: int, one: Placed) -> None:
        """Note that a request goes to a replica, where the next call of its task may find its KV."""
        if (task := one.request.task) is None:
            return
        self._homes[task.key] = number
        self._homes.move_to_end(task.key)
        if len(self._homes) > MOST_HOMES:
            self._homes.popitem(last=False)

    def lost_memory(self, number: int) -> None:
        """Note that a replica has lost the KV of all tasks."""
        for key in [key for key, home in self._homes.items() if home == number]:
            del self._homes[key]

    def ask(self, one: Placed) -> Ask:
        """Return what a request needs from a replica: tokens, deadline and pace."""
        request = one.request
        deadline_s, tpot_s = math.inf, math.inf
        num_left = self._lengths.remaining(one.seq)
        if request.targets is not None:
            # A request that has begun has no deadline of a first token left to keep.
            if not one.has_begun:
                deadline_s = request.arrival_s + request.targets.ttft_s
            tpot_s = request.targets.stages[0].tpot_s
            if request.targets.finish_s < math.inf:
                finish_s = request.arrival_s + request.targets.finish_s
                model = self._router.model
                limits = PaceLimits.of(model.zero_load_decode_s(1), 0.0, 0.0)
                prefill_s = model.zero_load_prefill_s(one.num_tokens)
                pace = pace_before(
                    request.arrival_s, finish_s, num_left, self._clock(), prefill_s, limits
                )
                deadline_s, tpot_s = min(deadline_s, pace.due_s), min(tpot_s, pace.tpot_s)
        return Ask(
            prompt_tokens=one.num_tokens,
            output_tokens=num_left,
            deadline_s=deadline_s,
            tpot_s=tpot_s,
            cached_tokens=self.cached_tokens(one),
            home=None if request.task is None else self._homes.get(request.task.key),
        )

    def choose(self, ask: Ask, absent: AbstractSet[int] = NOBODY) -> int:
        """Return the replica for a request; at least one replica must not be in ``absent``."""
        return self._router.choose(ask, self._clock(), absent)

    def better_than(
        self, number: int, one: Placed, absent: AbstractSet[int] = NOBODY
    ) -> int | None:
        """Note that a replica promises a request nothing, and return the next one to try.

        Returns:
            ``None`` if no other replica may promise the SLO, or the request has moved enough.
        """
        one.tried.add(number)
        if len(one.tried) > self._hop_limit:
            return None
        return self._router.choose_better(self.ask(one), self._clock(), one.tried | absent)
