"""`Placement`: chooses the replica of each request with a router, and keeps the router informed."""

from __future__ import annotations

import math
import time
from collections.abc import Set as AbstractSet

from minserve.controller.flights import Flight
from minserve.controller.prefixes import PrefixMap, chunks_of
from minserve.controller.replicas import Replica
from minserve.controller.router import Ask, Router
from minserve.planner.predict.lengths import LengthEstimator


class Placement:
    """Chooses replicas for flights, and learns from how flights end.

    Args:
        lengths: learns how long outputs are.
    """

    def __init__(self, router: Router, lengths: LengthEstimator) -> None:
        self._router, self._lengths = router, lengths
        self._prefixes = PrefixMap()

    def joined(self, replica: Replica) -> None:
        """Note that a replica has joined, with an empty prefix cache."""
        self._prefixes.forget(replica.number)
        self._router.report(replica.number, replica.load)

    def reported(self, replica: Replica) -> None:
        """Give the router the replica's reported load, plus the requests on their way to it."""
        self._router.report(replica.number, replica.load)
        for _, ask in replica.under_way:
            self._router.count_in(replica.number, ask)

    def ask(self, flight: Flight) -> Ask:
        """Return what a flight needs from a replica: tokens, deadline and pace."""
        request = flight.request
        ttft_s, tpot_s = math.inf, math.inf
        if request.targets is not None:
            ttft_s = request.targets.ttft_s
            tpot_s = request.targets.stages[0].tpot_s
        return Ask(
            prompt_tokens=flight.num_tokens,
            output_tokens=self._lengths.remaining(flight.sequence),
            # A request that has begun has no deadline of a first token left to keep.
            deadline_s=math.inf if flight.has_begun else request.arrival_s + ttft_s,
            tpot_s=tpot_s,
            cached_tokens=self._prefixes.cached(flight.chunks, len(request.prompt_token_ids)),
        )

    def choose(self, ask: Ask, absent: AbstractSet[int]) -> int:
        """Return the replica for a flight; at least one replica must not be in ``absent``."""
        return self._router.choose(ask, time.monotonic(), absent)

    def choose_better(self, flight: Flight, without: AbstractSet[int]) -> int | None:
        """Return another replica that may promise a flight its SLO; ``None`` if there is none."""
        return self._router.choose_better(self.ask(flight), time.monotonic(), without)

    def placed(self, flight: Flight, number: int) -> None:
        """Note that a replica is going to compute a flight's prompt."""
        self._prefixes.note(number, flight.chunks)

    def ended(self, flight: Flight, index: int) -> None:
        """Note that an output ended by itself: its length, and which replica holds its KV."""
        request, seq = flight.request, flight.sequence
        seq.token_ids = [*request.prompt_token_ids, *flight.outputs[index].token_ids]
        self._lengths.finished(seq)
        if flight.replica is not None:
            self._prefixes.note(flight.replica, chunks_of(seq.token_ids, request.cache_salt))
