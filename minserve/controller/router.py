"""Routers: they choose the replica of a request by arithmetic on what the replicas report.

`SloRouter` sends a request to the replica that can keep its SLO with the most prefill budget
left. If that replica promises nothing after all, the request moves on to another one that can
keep it, with its arrival time unchanged, up to a hop limit. If no replica can keep its SLO, the
one with the least work serves it. SLOs-Serve (arXiv 2504.08784) instead tries the replicas in
turn from a round-robin start.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minserve.errors import ConfigError
from minserve.planner.predict.perf_model import PerfModel
from minserve.planner.replica_load import ReplicaLoad

Floats = NDArray[np.float64]
# Stands for "no deadline".
FAR_S = 1e6
# A cached prefix of the whole prompt outweighs so many other sequences on a replica.
PREFIX_WORTH = 4.0
NOBODY: AbstractSet[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The needs of a request, on which its replica depends.

    Attributes:
        prompt_tokens: tokens of the prompt and of the output so far.
        output_tokens: tokens still to come, as predicted.
        deadline_s: time of its first token, on the clock of `Router.choose`; inf for none.
        tpot_s: seconds per output token that its decode must keep; inf for none.
        cached_tokens: by replica, leading tokens that its prefix index is believed to hold.
        home: the replica that had the last call of its task; ``None`` without one.
    """

    prompt_tokens: int
    output_tokens: int
    deadline_s: float
    tpot_s: float
    cached_tokens: Mapping[int, int] = field(default_factory=dict)
    home: int | None = None


class Router(ABC):
    """Places requests on replicas.

    Args:
        model: the speed of a replica.

    Attributes:
        num_replicas: number of replicas that requests can be placed on.
    """

    name: str

    def __init__(self, num_replicas: int, model: PerfModel) -> None:
        self.num_replicas = num_replicas
        self.model = model

    @abstractmethod
    def choose(self, ask: Ask, now: float, without: AbstractSet[int] = NOBODY) -> int:
        """Return the number of the replica for a request, and count the request in there.

        Args:
            now: the present time in seconds, on the clock of ``ask.deadline_s``.
            without: replicas that take no requests; at least one replica must not be among them.
        """

    def choose_better(self, ask: Ask, now: float, without: AbstractSet[int]) -> int | None:
        """Return the next replica to try for a request that one replica could not promise its SLO.

        Args:
            without: replicas that have been tried, or that take no requests.

        Returns:
            ``None`` if no other replica can keep the SLO, as far as this router can tell.
        """
        return None

    def report(self, replica: int, load: ReplicaLoad) -> None:  # noqa: B027 - some need none
        """Take the load that a replica reports."""

    def count_in(self, replica: int, ask: Ask) -> None:  # noqa: B027 - some need none
        """Count a request that is on its way to a replica and missing in its last report."""


class RoundRobinRouter(Router):
    """Takes the replicas in turn."""

    name = "round-robin"

    def __init__(self, num_replicas: int, model: PerfModel) -> None:
        super().__init__(num_replicas, model)
        self._next = 0

    def choose(self, ask: Ask, now: float, without: AbstractSet[int] = NOBODY) -> int:
        while self._next in without:
            self._next = (self._next + 1) % self.num_replicas
        replica, self._next = self._next, (self._next + 1) % self.num_replicas
        return replica


class LeastLoadedRouter(Router):
    """Takes the replica with the fewest sequences, waiting or running."""

    name = "least-loaded"

    def __init__(self, num_replicas: int, model: PerfModel) -> None:
        super().__init__(num_replicas, model)
        self._num_sequences = np.zeros(num_replicas)

    def report(self, replica: int, load: ReplicaLoad) -> None:
        self._num_sequences[replica] = load.num_sequences

    def choose(self, ask: Ask, now: float, without: AbstractSet[int] = NOBODY) -> int:
        replica = int(_masked(self._num_sequences, without, np.inf).argmin())
        self.count_in(replica, ask)
        return replica

    def count_in(self, replica: int, ask: Ask) -> None:
        self._num_sequences[replica] += 1


class SloRouter(Router):
    """Takes the replica that can keep the request's SLO with the most prefill budget left.

    A call of a task goes back to the replica of the call before, as long as that one can keep it.
    """

    name = "slo"

    def __init__(self, num_replicas: int, model: PerfModel) -> None:
        super().__init__(num_replicas, model)
        self._prefill = np.zeros(num_replicas)
        self._decode_rate = np.zeros(num_replicas)
        self._tightest = np.full(num_replicas, np.inf)
        self._free = np.full(num_replicas, np.inf)
        self._num_sequences = np.zeros(num_replicas)
        self._steep = model.steepest
        # Without a pace to keep, iterations may be as long as so many lone decodes.
        self._longest_s = 5.0 * model.zero_load_decode_s(1)

    def report(self, replica: int, load: ReplicaLoad) -> None:
        self._prefill[replica] = load.prefill_tokens
        self._decode_rate[replica] = load.decode_rate
        self._tightest[replica] = load.tightest_tpot_s
        self._free[replica] = load.free_tokens
        self._num_sequences[replica] = load.num_sequences

    def choose(self, ask: Ask, now: float, without: AbstractSet[int] = NOBODY) -> int:
        budget, work, feasible = self._weigh(ask, now)
        if math.isinf(ask.deadline_s) and math.isinf(ask.tpot_s):
            # Nothing is promised: few other sequences count, and a cached prefix.
            score = -self._num_sequences - PREFIX_WORTH * work / ask.prompt_tokens
        else:
            # Among replicas that cannot keep it, the one with the least prefill work comes first.
            score = np.where(feasible, budget + 1e12, -self._prefill - work)
        score = _masked(score, without, -np.inf)
        best = score == score.max()
        replica = int(np.where(best, self._num_sequences, np.inf).argmin())
        if ask.home is not None and ask.home not in without and feasible[ask.home]:
            replica = ask.home
        self.count_in(replica, ask)
        return replica

    def choose_better(self, ask: Ask, now: float, without: AbstractSet[int]) -> int | None:
        budget, _, feasible = self._weigh(ask, now)
        feasible[list(without)] = False
        if not feasible.any():
            return None
        replica = int(np.where(feasible, budget, -np.inf).argmax())
        self.count_in(replica, ask)
        return replica

    def count_in(self, replica: int, ask: Ask) -> None:
        work = ask.prompt_tokens - ask.cached_tokens.get(replica, 0)
        self._prefill[replica] += work
        self._free[replica] -= work + ask.output_tokens
        self._decode_rate[replica] += 1.0 / ask.tpot_s
        self._tightest[replica] = min(self._tightest[replica], ask.tpot_s)
        self._num_sequences[replica] += 1

    def _weigh(self, ask: Ask, now: float) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Return three arrays, with one entry for each replica.

        These are the prefill budget in tokens that the request would leave until its deadline, the
        tokens to prefill there, and whether the request's SLO can be kept.
        """
        work = np.full(self.num_replicas, float(ask.prompt_tokens))
        for replica, num_tokens in ask.cached_tokens.items():
            work[replica] -= num_tokens
        window = np.minimum(np.minimum(self._tightest, ask.tpot_s), self._longest_s)
        constant_s = self._steep.base + self._steep.eager  # of a batch with a prefill
        tokens_per_s = (1.0 - constant_s / window) / self._steep.tokens
        left = tokens_per_s - self._decode_rate - 1.0 / ask.tpot_s
        budget = left * min(ask.deadline_s - now, FAR_S) - self._prefill - work
        has_room = self._free >= work + ask.output_tokens
        return budget, work, (budget >= 0) & (left >= 0) & has_room


def _masked(scores: Floats, without: AbstractSet[int], value: float) -> Floats:
    """Return the scores with ``value`` in place of those of the replicas ``without``."""
    if not without:
        return scores
    masked = scores.copy()
    masked[list(without)] = value
    return masked


ROUTERS: Mapping[str, Callable[[int, PerfModel], Router]] = {
    kind.name: kind for kind in (SloRouter, LeastLoadedRouter, RoundRobinRouter)
}


def make_router(name: str, num_replicas: int, model: PerfModel) -> Router:
    """Return a new router of that name.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in ROUTERS:
        raise ConfigError(f"unknown router {name!r}; known: {', '.join(ROUTERS)}")
    return ROUTERS[name](num_replicas, model)
