"""`Dispatcher`: sends flights to replicas, hands on what they bring, and resumes them elsewhere.

It has all flights from their submission to their end. When a replica is lost, its flights go on
behind the tokens that their clients have: at once, or alone if they may be the cause of the loss
(see `Quarantine`). All methods belong to one asyncio loop; none of them blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from minserve.controller import messages as m
from minserve.controller.flight_placement import FlightPlacement
from minserve.controller.flights import Flight, FlightHandle, ending
from minserve.controller.processes import Watcher
from minserve.controller.quarantine import Quarantine
from minserve.controller.replicas import Replica, ReplicaState
from minserve.controller.router import Ask
from minserve.engine.tasks import TaskWatch
from minserve.errors import (
    EngineStoppedError,
    GenerationError,
    ProtocolError,
    ReplicaHungError,
    SLOUnattainableError,
)
from minserve.outputs import OutputDelta
from minserve.request import FinishReason, Request

log = logging.getLogger(__name__)

_CONVICTED = (
    "this request ends the process that runs it: replica after replica was lost while it ran, at "
    "last while nothing else ran there, so it is not given to another one"
)


@dataclass(slots=True)
class RoutingStats:
    """The numbers of moves of requests between replicas since the start.

    Attributes:
        num_hops: times that a request moved on because its replica could not promise its SLO.
        num_resumed: times that a request went on elsewhere because its replica was lost.
    """

    num_hops: int = 0
    num_resumed: int = 0


class Dispatcher:
    """Decides where flights run.

    Args:
        watchers: by the number of a replica, what keeps its process on this machine running.
        changed: called when the last flight has ended or a replica is drained.

    Attributes:
        num_unfinished: outputs that wait or run.
    """

    def __init__(
        self,
        replicas: SequenceOf[Replica],
        watchers: Mapping[int, Watcher],
        changed: Callable[[], None],
    ) -> None:
        self.stats = RoutingStats()
        self.num_unfinished = 0
        self._replicas, self._watchers, self._changed = replicas, watchers, changed
        self._flights: dict[str, Flight] = {}
        self._handles: dict[str, FlightHandle] = {}
        # Flights for which no replica is up.
        self._grounded: dict[str, Flight] = {}
        self._quarantine = Quarantine()
        self._inquiries: set[asyncio.Task[None]] = set()

    # --- what the controller asks ---

    @property
    def has_flights(self) -> bool:
        return bool(self._flights)

    def num_by_replica(self) -> Counter[int | None]:
        """Return how many requests each replica runs."""
        # A list first, because metrics are read from another thread.
        return Counter(flight.replica for flight in list(self._flights.values()))

    def absent(self) -> set[int]:
        """Return the numbers of the replicas that take no requests."""
        return {r.number for r in self._replicas if r.state is not ReplicaState.UP}

    def start(self, request: Request, prompt: str | None, watch: TaskWatch) -> FlightHandle:
        """Send a new request to a replica.

        Args:
            watch: hears of all that its client is told.
        """
        flight = Flight.of(request)
        handle = FlightHandle(flight, prompt, self._abort, self._complete, watch)
        self._flights[request.request_id] = flight
        self._handles[request.request_id] = handle
        self.num_unfinished += request.params.n
        self._place(flight)
        return handle

    def end_all(self, error: EngineStoppedError) -> None:
        """End all requests with an error."""
        for flight in list(self._flights.values()):
            self._end(flight, FinishReason.ABORT, error)

    # --- what becomes of replicas ---

    def joined(self, replica: Replica, placement: FlightPlacement) -> None:
        """Use a replica that has joined."""
        self._placement = placement
        placement.joined(replica)
        # Suspects first: it has nothing else to do yet.
        self._tend()
        self.land_grounded()

    def land_grounded(self) -> None:
        """Place the requests that waited for any replica."""
        grounded, self._grounded = self._grounded, {}
        for request_id, flight in grounded.items():
            if request_id in self._flights:
                self._place(flight)

    def settle(self, replica: Replica) -> None:
        """Mark a draining replica as drained once it has no request left."""
        if replica.state is ReplicaState.DRAINING and not self._runs_any(replica.number):
            replica.enter(ReplicaState.DRAINED)
            self._changed()

    def lost(self, replica: Replica, error: Exception) -> None:
        """Resume a lost replica's requests, once it is known how its process ended."""
        number, watcher = replica.number, self._watchers.get(replica.number)
        alone = self._quarantine.wards.pop(number, None)
        flights = [flight for flight in self._flights.values() if flight.replica == number]
        for flight in flights:
            flight.replica, flight.moving_to = None, None
        if watcher is None or replica.hello is None:
            self._resume(flights, alone, fault=isinstance(error, ReplicaHungError))
        elif isinstance(error, ReplicaHungError | ProtocolError):
            watcher.kill(replica.hello.pid)
            self._resume(flights, alone, fault=isinstance(error, ReplicaHungError))
        else:
            task = asyncio.create_task(self._inquire(watcher, replica.hello.pid, flights, alone))
            self._inquiries.add(task)
            task.add_done_callback(self._inquiries.discard)

    async def _inquire(
        self, watcher: Watcher, pid: int, flights: list[Flight], alone: Flight | None
    ) -> None:
        self._resume(flights, alone, fault=await watcher.ended_by_fault(pid))

    def _resume(self, flights: list[Flight], alone: Flight | None, *, fault: bool) -> None:
        """Place a lost replica's requests, but for those that are convicted of its loss."""
        flights = [one for one in flights if one.request.request_id in self._flights]
        convicted = self._quarantine.judge(flights, alone=alone, fault=fault)
        for flight in convicted:
            log.error("request %s is ended: %s", flight.request.request_id, _CONVICTED)
            self._end(flight, FinishReason.ERROR, GenerationError(_CONVICTED))
        going_on = [flight for flight in flights if flight not in convicted]
        if fault and going_on:
            log.warning("%d requests may be the cause; each goes on alone", len(going_on))
        for flight in going_on:
            self.stats.num_resumed += 1
            self._place(flight)
        self._tend()

    # --- suspects ---

    def _tend(self) -> None:
        """Give waiting suspects replicas of their own, and give back those not needed any more."""
        quarantine = self._quarantine
        if not quarantine.is_waiting and not quarantine.wards:
            return
        moving = self._leave_wards()
        if quarantine.is_waiting and (number := self._next_ward()) is not None:
            quarantine.wards[number] = None
            # Where it is not idle, what it runs goes on elsewhere.
            moving += [flight for flight in self._flights.values() if flight.replica == number]
        for flight in moving:
            self._take_back(flight)
        self._fill_wards()
        for flight in moving:
            self._place(flight)
        if self._open():
            self.land_grounded()

    def _fill_wards(self) -> None:
        """Send a suspect to each ward that has nothing to do, or open it where none is left."""
        wards = self._quarantine.wards
        for number in [number for number, occupant in wards.items() if occupant is None]:
            if not self._replicas[number].is_up:
                del wards[number]
            elif self._is_idle(number):
                if (flight := self._quarantine.admit(number)) is None:
                    del wards[number]
                else:
                    self._send(flight, number, self._placement.ask(flight))

    def _leave_wards(self) -> list[Flight]:
        """Return those who are suspect no more and have to leave their ward to another suspect."""
        quarantine, leaving = self._quarantine, []
        for number, flight in list(quarantine.wards.items()):
            if flight is not None and not quarantine.is_suspect(flight):
                if quarantine.is_waiting:
                    quarantine.wards[number] = None
                    leaving.append(flight)
                else:
                    del quarantine.wards[number]
        return leaving

    def _next_ward(self) -> int | None:
        """Return a replica to become a ward, or ``None``: the last open one does only if no other
        replica is a ward.
        """
        wards, candidates = self._quarantine.wards, self._open()
        if not candidates or (wards and len(candidates) == 1):
            return None
        idle = next((number for number in candidates if self._is_idle(number)), None)
        if idle is None and self._quarantine.is_pressing(time.monotonic()):
            counts = self.num_by_replica()
            return min(candidates, key=lambda number: (counts[number], number))
        return idle

    def _closed(self) -> set[int]:
        """Return the numbers of the replicas that take no request, or only a suspect."""
        return self.absent() | self._quarantine.wards.keys()

    def _open(self) -> list[int]:
        """Return the numbers of the replicas that take any request."""
        closed = self._closed()
        return [one.number for one in self._replicas if one.number not in closed]

    def _is_idle(self, number: int) -> bool:
        """Return whether a replica has said that it runs nothing, and has been sent nothing since."""
        replica = self._replicas[number]
        reported = not replica.under_way and not replica.load.num_sequences
        return replica.is_up and reported and not self._runs_any(number)

    def _runs_any(self, number: int) -> bool:
        return any(flight.replica == number for flight in self._flights.values())

    def _take_back(self, flight: Flight) -> None:
        """Take a request from its replica, if it is on one."""
        if flight.replica is not None:
            self._replicas[flight.replica].post(m.Abort(flight.request.request_id))
            flight.replica, flight.moving_to = None, None

    # --- requests ---

    def _place(self, flight: Flight, number: int | None = None) -> None:
        """Send a request to a replica, by default to the replica that the router chooses.

        A suspect waits until `_tend` finds it a ward.
        """
        if self._quarantine.is_suspect(flight):
            flight.replica = None
            self._quarantine.wait(flight, time.monotonic())
            return
        closed, ask = self._closed(), self._placement.ask(flight)
        if number is None or number in closed:
            if len(closed) == len(self._replicas):
                flight.replica = None
                self._grounded[flight.request.request_id] = flight
                return
            number = self._placement.choose(ask, closed)
        self._send(flight, number, ask)

    def _send(self, flight: Flight, number: int, ask: Ask) -> None:
        flight.replica = number
        self._replicas[number].submit(flight.submit(time.monotonic()), ask)
        self._placement.placed(flight, number)

    def told(self, replica: Replica, message: m.News | m.Heartbeat | m.Withdrawn) -> None:
        """Take what a replica says.

        Raises:
            ProtocolError: if it cannot be.
        """
        match message:
            case m.Withdrawn():
                self._move(message.request_id, replica)
            case m.Heartbeat():
                self._placement.reported(replica)
            case m.News():
                self._take_news(replica, message)
        self.settle(replica)
        self._tend()

    def _take_news(self, replica: Replica, news: m.News) -> None:
        now = time.monotonic()
        for delta in news.deltas:
            if (flight := self._flight_on(replica, delta.request_id)) is not None:
                self._deliver(flight, delta, now)
        if news.load is not None:
            self._placement.reported(replica)
        for request_id in news.declined:
            if (flight := self._flight_on(replica, request_id)) is not None:
                self._look_elsewhere(flight, replica)

    def _flight_on(self, replica: Replica, request_id: str) -> Flight | None:
        """Return a request if this replica runs it, else ``None``.

        News from any other replica about the request does not count.
        """
        flight = self._flights.get(request_id)
        return flight if flight is not None and flight.replica == replica.number else None

    def _deliver(self, flight: Flight, delta: OutputDelta, now: float) -> None:
        if not flight.expects(delta.index):
            raise ProtocolError(f"it told of output {delta.index}, which is none or has ended")
        if isinstance(delta.error, SLOUnattainableError) and self._retried(flight):
            return
        flight.moving_to = None
        flight.note(delta, now)
        self._handles[delta.request_id].put(delta)
        if delta.finish_reason is not None:
            self.num_unfinished -= 1
            if delta.finish_reason.is_own_end:
                self._placement.ended(flight, delta.index)
            if not flight.num_open:
                self._forget(flight)
                return
        self._quarantine.clear_if_proved(flight)

    def _retried(self, flight: Flight) -> bool:
        """Return True if another replica is now asked for a request that this replica refuses.

        Either all outputs of a request are refused or none, so the client is told all or nothing.
        """
        if flight.has_begun or flight.replica is None or self._quarantine.is_suspect(flight):
            return False
        other = self._placement.better_than(flight.replica, flight, self._closed())
        if other is None:
            return False
        self._hop(flight, other)
        return True

    def _look_elsewhere(self, flight: Flight, replica: Replica) -> None:
        """Ask a replica to give back a request without a promise, if another replica may promise
        it.
        """
        if flight.moving_to is not None or flight.has_begun or self._quarantine.is_suspect(flight):
            return
        other = self._placement.better_than(replica.number, flight, self._closed())
        if other is not None:
            flight.moving_to = other
            replica.post(m.Withdraw(flight.request.request_id))

    def _move(self, request_id: str, replica: Replica) -> None:
        """Send on a request that a replica has given back."""
        if (flight := self._flight_on(replica, request_id)) is not None:
            self._hop(flight, flight.moving_to)

    def _hop(self, flight: Flight, other: int | None) -> None:
        flight.moving_to = None
        self.stats.num_hops += 1
        self._place(flight, other)

    def _abort(self, request_id: str) -> None:
        """End a request because its client has left."""
        flight = self._flights.get(request_id)
        if flight is not None:
            self._end(flight, FinishReason.ABORT, None)
            self._tend()

    def _complete(self, request_id: str) -> None:
        """Let the replica end a request, of which its client wants nothing more."""
        flight = self._flights.get(request_id)
        if flight is not None and flight.replica is not None:
            self._replicas[flight.replica].post(m.Abort(request_id, has_all=True))
        elif flight is not None:
            self._abort(request_id)

    def _end(self, flight: Flight, reason: FinishReason, error: Exception | None) -> None:
        """End a request for a reason that lies with the controller, not with the replica."""
        request_id = flight.request.request_id
        handle = self._handles[request_id]
        for delta in ending(flight, reason, error):
            handle.put(delta)
        self.num_unfinished -= flight.num_open
        if flight.replica is not None:
            self._replicas[flight.replica].post(m.Abort(request_id))
        self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        request_id = flight.request.request_id
        del self._flights[request_id], self._handles[request_id]
        self._grounded.pop(request_id, None)
        self._quarantine.forget(flight)
        if not self._flights:
            self._changed()
