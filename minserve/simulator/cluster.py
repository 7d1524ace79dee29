"""`Cluster`: simulated replicas behind a router."""

from __future__ import annotations

from collections.abc import Sequence

from minserve.controller.router import Ask, Router
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.replica_load import load_of
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulated_replica import SimulatedReplica
from minserve.simulator.simulated_sequence import SimulatedSequence
from minserve.slo.objectives import Standing


class Cluster:
    """Routes arriving requests to replicas, and runs every replica's iterations on the clock.

    Args:
        lengths: the estimator by which the router guesses output lengths.
        hop_limit: number of times that a request may be moved on, while its replica promises it
            nothing and it has not begun.
    """

    def __init__(
        self,
        loop: EventLoop,
        replicas: Sequence[SimulatedReplica],
        router: Router,
        lengths: LengthEstimator,
        hop_limit: int = 2,
    ) -> None:
        self._loop, self.replicas, self._router = loop, replicas, router
        self._lengths, self._hop_limit = lengths, hop_limit
        self._changed = set(range(len(replicas)))
        self._tried: dict[str, set[int]] = {}
        self._routes = len(replicas) > 1
        # By conversation, the replica that holds its last turn's KV.
        self._homes: dict[int, int] = {}
        self.load: OfferedLoad | None = None

    def arrive(self, *seqs: SimulatedSequence) -> None:
        """Take a new request, with all of its outputs, and give it to a replica."""
        self._place(seqs, 0 if not self._routes else self._route(seqs[0]))

    def _place(self, seqs: Sequence[SimulatedSequence], number: int) -> None:
        replica = self.replicas[number]
        for seq in seqs:
            replica.submit(seq)
        self._changed.add(number)
        if not replica.busy:
            self._begin(number)

    def _begin(self, number: int) -> None:
        replica = self.replicas[number]
        moving: list[tuple[SimulatedSequence, int]] = []

        def gives_away(seq: SimulatedSequence) -> bool:
            other = self._better_than(seq, number)
            if other is not None:
                moving.append((seq, other))
            return other is not None

        seconds, refused = replica.begin(gives_away)
        self._loop.at(self._loop.now + seconds, lambda: self._end(number))
        self._changed.add(number)
        for seq in refused:
            self._tried.pop(seq.request.request_id, None)
            self.load.refused(seq)
        for seq, other in moving:
            for one in seq.siblings:
                one.hops += 1
                one.standing = Standing.PENDING
            self._place(seq.siblings, other)

    def _end(self, number: int) -> None:
        replica = self.replicas[number]
        for seq in replica.end():
            self._tried.pop(seq.request.request_id, None)
            self._lengths.finished(seq)
            if self._routes:
                self._homes[seq.conversation] = number
            self.load.ended(seq)
        self._changed.add(number)
        if replica.has_work and not replica.busy:
            self._begin(number)

    def _route(self, seq: SimulatedSequence) -> int:
        self._report()
        return self._router.choose(self._ask(seq), self._loop.now)

    def _report(self) -> None:
        for number in self._changed:
            replica = self.replicas[number]
            self._router.report(number, load_of(replica.planner, replica.view()))
        self._changed.clear()

    def _ask(self, seq: SimulatedSequence) -> Ask:
        progress, turn = seq.progress, seq.turn
        cached = {}
        if turn.shared_tokens:
            cached[self._homes[seq.conversation]] = turn.shared_tokens
        return Ask(
            prompt_tokens=seq.num_prompt_tokens,
            output_tokens=self._lengths.remaining(seq),
            deadline_s=progress.next_deadline_s,
            tpot_s=progress.tpot_s,
            cached_tokens=cached,
        )

    def _better_than(self, seq: SimulatedSequence, number: int) -> int | None:
        """Return the next replica to try for a request without a promise; ``None`` if there is
        none.
        """
        if not self._routes or seq.hops >= self._hop_limit:
            return None
        tried = self._tried.setdefault(seq.request.request_id, set())
        tried.add(number)
        self._report()
        return self._router.choose_better(self._ask(seq), self._loop.now, tried)
