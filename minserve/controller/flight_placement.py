"""`FlightPlacement`: the placement of a controller's flights on processes."""

from __future__ import annotations

import time
from collections.abc import Mapping

from minserve.controller.flights import Flight
from minserve.controller.placement import Placement
from minserve.controller.prefixes import PrefixMap, chunks_of
from minserve.controller.replicas import Replica
from minserve.controller.router import Router
from minserve.planner.predict.lengths import LengthEstimator


class FlightPlacement(Placement[Flight]):
    """Chooses replicas for flights, and learns from how flights end.

    It guesses cached prefixes from the prompts and outputs that each replica has computed.
    """

    def __init__(self, router: Router, lengths: LengthEstimator, hop_limit: int) -> None:
        super().__init__(router, lengths, hop_limit, time.monotonic)
        self._prefixes = PrefixMap()

    def cached_tokens(self, one: Flight) -> Mapping[int, int]:
        return self._prefixes.cached(one.chunks, len(one.request.prompt_token_ids))

    def joined(self, replica: Replica) -> None:
        """Note that a replica has joined, with an empty prefix cache."""
        self._prefixes.forget(replica.number)
        self.lost_memory(replica.number)
        self.report(replica.number, replica.load)

    def reported(self, replica: Replica) -> None:
        """Give the router the replica's reported load, and the requests on their way to it."""
        self.report(replica.number, replica.load, (ask for _, ask in replica.under_way))

    def placed(self, flight: Flight, number: int) -> None:
        """Note that a replica is going to compute a flight's prompt."""
        self._prefixes.note(number, flight.chunks)
        self.went_to(number, flight)

    def ended(self, flight: Flight, index: int) -> None:
        """Note that an output ended by itself: its length, and which replica holds its KV."""
        request, seq = flight.request, flight.seq
        seq.token_ids = [*request.prompt_token_ids, *flight.outputs[index].token_ids]
        self._lengths.finished(seq)
        if flight.replica is not None:
            self._prefixes.note(flight.replica, chunks_of(seq.token_ids, request.cache_salt))
