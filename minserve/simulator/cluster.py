"""`Cluster`: simulated replicas behind a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minserve.controller.placement import Placement
from minserve.controller.router import Router
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.replica_load import load_of
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulated_replica import SimulatedReplica
from minserve.simulator.simulated_sequence import SimulatedSequence
from minserve.slo.objectives import Standing


class TurnPlacement(Placement[SimulatedSequence]):
    """The placement of turns, each given by its first output.

    Attributes:
        homes: by conversation, the replica that holds its last turn's KV.
    """

    homes: dict[int, int]

    def __init__(
        self, router: Router, lengths: LengthEstimator, hop_limit: int, loop: EventLoop
    ) -> None:
        super().__init__(router, lengths, hop_limit, loop.clock)
        self.homes = {}

    def cached_tokens(self, one: SimulatedSequence) -> Mapping[int, int]:
        if not one.turn.shared_tokens:
            return {}
        return {self.homes[one.conversation]: one.turn.shared_tokens}


class Cluster:
    """Routes arriving requests to replicas, and runs every replica's iterations on the clock.

    Args:
        router: places the requests; not needed for a single replica.
        lengths: the estimator by which the router guesses output lengths.
        hop_limit: number of times that a request may be moved on, while its replica promises it
            nothing and it has not begun.
    """

    def __init__(
        self,
        loop: EventLoop,
        replicas: Sequence[SimulatedReplica],
        router: Router | None,
        lengths: LengthEstimator,
        hop_limit: int = 2,
    ) -> None:
        self._loop, self.replicas, self._lengths = loop, replicas, lengths
        self._changed = set(range(len(replicas)))
        self._placement: TurnPlacement | None = None
        if router is not None and len(replicas) > 1:
            self._placement = TurnPlacement(router, lengths, hop_limit, loop)
        self.load: OfferedLoad | None = None

    def arrive(self, *seqs: SimulatedSequence) -> None:
        """Take a new request, with all of its outputs, and give it to a replica."""
        number = 0
        if self._placement is not None:
            self._report(self._placement)
            number = self._placement.choose(self._placement.ask(seqs[0]))
        self._place(seqs, number)

    def _place(self, seqs: Sequence[SimulatedSequence], number: int) -> None:
        replica = self.replicas[number]
        if self._placement is not None:
            self._placement.went_to(number, seqs[0])
        for seq in seqs:
            replica.submit(seq)
        self._changed.add(number)
        if not replica.busy:
            self._begin(number)

    def _begin(self, number: int) -> None:
        replica = self.replicas[number]
        moving: list[tuple[SimulatedSequence, int]] = []

        def gives_away(seq: SimulatedSequence) -> bool:
            other = self._better_than(number, seq)
            if other is not None:
                moving.append((seq, other))
            return other is not None

        seconds, refused = replica.begin(gives_away)
        self._loop.at(self._loop.now + seconds, lambda: self._end(number))
        self._changed.add(number)
        for seq in refused:
            again = seq.as_new()
            another = self._better_than(number, again)
            if another is None:
                self._load.refused(seq)
            else:
                self._hop(again, another)
        for seq, other in moving:
            self._hop(seq, other)

    def _hop(self, seq: SimulatedSequence, number: int) -> None:
        """Move a request, given by its first output, to another replica."""
        for one in seq.siblings:
            one.hops += 1
            one.standing = Standing.PENDING
        self._place(seq.siblings, number)

    def _end(self, number: int) -> None:
        replica = self.replicas[number]
        for seq in replica.end():
            self._lengths.finished(seq)
            if self._placement is not None:
                self._placement.homes[seq.conversation] = number
            self._load.ended(seq)
        self._changed.add(number)
        if replica.has_work and not replica.busy:
            self._begin(number)

    def _better_than(self, number: int, seq: SimulatedSequence) -> int | None:
        """Return the next replica to try for a request that one replica promises nothing."""
        if self._placement is None:
            return None
        self._report(self._placement)
        return self._placement.better_than(number, seq)

    def _report(self, placement: TurnPlacement) -> None:
        """Tell the load of each replica that has changed since it was told last."""
        for number in self._changed:
            replica = self.replicas[number]
            placement.report(number, load_of(replica.planner, replica.view()))
        self._changed.clear()

    @property
    def _load(self) -> OfferedLoad:
        assert self.load is not None, "set before the first request arrives"
        return self.load
