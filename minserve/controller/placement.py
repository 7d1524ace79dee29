"""`Placement`: where requests go. A router, and what it is told of requests and replicas."""

from __future__ import annotations

import math
import time
from collections.abc import Set as AbstractSet

from minserve.controller.flights import Flight
from minserve.controller.prefixes import PrefixMap, chunks_of
from minserve.controller.replicas import Replica
from minserve.controller.router import Ask, Router
from minserve.planner.lengths import LengthEstimator


class Placement:
    """Chooses replicas for flights, and learns from what becomes of them.

    Args:
        lengths: learns how long outputs are.
    """

    def __init__(self, router: Router, lengths: LengthEstimator) -> None:
        self._router, self._lengths = router, lengths
        self._prefixes = PrefixMap()

    def joined(self, replica: Replica) -> None:
        """A replica has come, with an empty memory."""
        self._prefixes.forget(replica.number)
        self._router.report(replica.number, replica.load)

    def reported(self, replica: Replica) -> None:
        """A replica has said how it stands; it does not know yet of what is under way to it."""
        self._router.report(replica.number, replica.load)
        for _, ask in replica.under_way:
            self._router.count_in(replica.number, ask)

    def ask(self, flight: Flight) -> Ask:
        """What a flight needs."""
        request = flight.request
        ttft_s, tpot_s = math.inf, math.inf
        if request.targets is not None:
            ttft_s = request.targets.ttft_s
            tpot_s = request.targets.stages[0].tpot_s
        return Ask(
            prompt_tokens=flight.num_tokens,
            output_tokens=self._lengths.remaining(flight.sequence),
            # One that has begun is late already for whatever there is to be late for.
            deadline_s=math.inf if flight.has_begun else request.arrival_s + ttft_s,
            tpot_s=tpot_s,
            cached_tokens=self._prefixes.cached(flight.chunks, len(request.prompt_token_ids)),
        )

    def choose(self, ask: Ask, absent: AbstractSet[int]) -> int:
        """A replica for a flight; at least one must be there."""
        return self._router.choose(ask, time.monotonic(), absent)

    def choose_better(self, flight: Flight, without: AbstractSet[int]) -> int | None:
        """Another replica that may promise a flight its SLO, where there is one."""
        return self._router.choose_better(self.ask(flight), time.monotonic(), without)

    def placed(self, flight: Flight, number: int) -> None:
        """A replica is going to compute a flight's prompt."""
        self._prefixes.note(number, flight.chunks)

    def ended(self, flight: Flight, index: int) -> None:
        """An output came to its own end: how long it was, and who holds its KV now."""
        request, seq = flight.request, flight.sequence
        seq.token_ids = [*request.prompt_token_ids, *flight.outputs[index].token_ids]
        self._lengths.finished(seq)
        if flight.replica is not None:
            self._prefixes.note(flight.replica, chunks_of(seq.token_ids, request.cache_salt))
