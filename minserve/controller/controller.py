"""`Controller`: several replicas that act as one engine.

It checks requests, routes each to a replica, and hands on the tokens that come back. It keeps
what a client was sent until the request ends, so that another replica can continue the request
if the first replica is lost. All methods belong to one asyncio loop; none of them blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from minserve.config import ControllerConfig, EngineConfig
from minserve.controller import messages as m
from minserve.controller.flight_placement import FlightPlacement
from minserve.controller.flights import Flight, FlightHandle, ending
from minserve.controller.processes import STOP_S, Watcher
from minserve.controller.rendezvous import Rendezvous
from minserve.controller.replicas import Replica, ReplicaState, ReplicaTable
from minserve.controller.router import make_router
from minserve.engine.intake import Intake, check_room, load_front
from minserve.engine.stats import EngineStats
from minserve.engine.text.inputs import PromptProcessor
from minserve.errors import (
    EngineStoppedError,
    GenerationError,
    InvalidRequestError,
    NoReplicaError,
    ReplicaLostError,
    SLOUnattainableError,
)
from minserve.outputs import OutputDelta, ReplicaReport
from minserve.planner.predict.lengths import make_length_estimator
from minserve.planner.predict.perf_model import PerfModel
from minserve.prompts import Prompt
from minserve.request import FinishReason
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO

log = logging.getLogger(__name__)

# A request is ended if more replicas than this were lost while they ran it, without one token
# between the losses: the request is then the likely cause. A smaller number proves little: where
# replicas are lost for other reasons, their requests move to the replicas that are lost next.
MOST_LOSSES = 9
# Seconds for a new process to load the model and join.
RESTART_S = 600.0
_SUSPECT = (
    f"{MOST_LOSSES + 1} replicas in a row were lost while this request ran on them, so it is not "
    "given to another one"
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


class _Service(NamedTuple):
    """What the controller can make only once the first replica has told of its model."""

    intake: Intake
    placement: FlightPlacement


class Controller:
    """Has the interface of an `AsyncEngine`, with replicas behind it.

    Args:
        engine_config: the settings of every replica's engine.
        rendezvous: where the replicas register.
        watchers: one for each replica whose process this process keeps running.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        config: ControllerConfig,
        rendezvous: Rendezvous,
        watchers: SequenceOf[Watcher] = (),
    ) -> None:
        self._watchers = {watcher.spec.index: watcher for watcher in watchers}
        self._watching: list[asyncio.Task[None]] = []
        self.config, self._settings = engine_config, config
        self.tokenizer, self.sampling_defaults = load_front(engine_config)
        self.table = ReplicaTable(
            rendezvous,
            config.replicas,
            config.replica_timeout,
            joined=self._joined,
            told=self._told,
            lost=self._lost,
        )
        self.routing = RoutingStats()
        self._service: _Service | None = None
        self._flights: dict[str, Flight] = {}
        self._handles: dict[str, FlightHandle] = {}
        # Flights whose replica was lost while no other replica is up.
        self._grounded: dict[str, Flight] = {}
        self._num_unfinished = 0
        self._accepting = False
        self._changed = asyncio.Event()

    @property
    def _intake(self) -> Intake:
        return self._ready().intake

    @property
    def _placement(self) -> FlightPlacement:
        return self._ready().placement

    def _ready(self) -> _Service:
        if self._service is None:
            raise NoReplicaError("no replica has come yet; they are being started")
        return self._service

    # --- the interface of an engine ---

    @property
    def model_name(self) -> str:
        return next(r.hello.model_name for r in self.table.replicas if r.hello is not None)

    @property
    def prompts(self) -> PromptProcessor:
        return self._intake.prompts

    @property
    def max_model_len(self) -> int:
        return self._intake.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._intake.vocab_size

    @property
    def slo_classes(self) -> Mapping[str, SLO]:
        return self._intake.promises.classes

    @property
    def default_slo(self) -> SLO | None:
        return self._intake.promises.default

    @property
    def thinking_marker(self) -> str | None:
        return self._intake.promises.thinking_marker

    @property
    def num_unfinished(self) -> int:
        """Outputs that wait or run."""
        return self._num_unfinished

    @property
    def is_healthy(self) -> bool:
        """True while requests are accepted and at least one replica takes them."""
        return self._accepting and len(self._absent()) < len(self.table.replicas)

    @property
    def iteration_s(self) -> float:
        """Always 0: the controller gives up a replica whose iteration takes too long."""
        return 0.0

    @property
    def replica_set(self) -> Controller:
        """What the server asks about replicas, and tells them."""
        return self

    def stats_by_replica(self) -> Mapping[str, EngineStats]:
        """Return the newest statistics of each replica, by its number."""
        return {str(replica.number): replica.stats for replica in self.table.replicas}

    async def start(self) -> None:
        """Start the replicas and connect them; returns when the first one is up.

        The others are started after that, so that they find the first one's profile of the device.

        Raises:
            ReplicaLostError, ReplicaRefusedError: if a process cannot be started.
        """
        self.table.start()
        self._accepting = True
        first, *others = self._watchers.values() or (None,)
        if first is not None:
            self._watch(first)
        while not self.is_healthy:
            change = asyncio.create_task(self._next_change())
            done, _ = await asyncio.wait(
                [change, *self._watching], return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        self.table.open_to_others()
        for watcher in others:
            self._watch(watcher)
        for task in self._watching:
            task.add_done_callback(_log_failure)

    def _watch(self, watcher: Watcher) -> None:
        replica = self.table.replicas[watcher.spec.index]
        task = asyncio.create_task(watcher.run(lambda: replica.hello is not None))
        self._watching.append(task)

    async def stop(self, timeout_s: float = 0.0) -> None:
        """Accept no more requests, wait for the running ones, fail the rest, and end the replicas.

        Args:
            timeout_s: longest wait for running requests, in seconds.
        """
        self._accepting = False
        try:
            async with asyncio.timeout(timeout_s):
                while self._flights:
                    await self._next_change()
        except TimeoutError:
            log.warning("aborting %d unfinished outputs", self._num_unfinished)
        stopped = EngineStoppedError("the server is shutting down")
        for flight in list(self._flights.values()):
            self._end(flight, FinishReason.ABORT, stopped)
        # A replica that is still loading was not told to stop, and has no request to lose.
        patience_s = {r.number: STOP_S if r.is_connected else 0.0 for r in self.table.replicas}
        await self.table.close()
        await asyncio.gather(
            *(watcher.stop(patience_s[number]) for number, watcher in self._watchers.items())
        )

    def submit(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        slo: SLO | str | None = None,
        age_s: float = 0.0,
    ) -> list[FlightHandle]:
        """Submit one request per prompt, as `AsyncEngine.submit` does.

        Raises:
            NoReplicaError: if no replica is up.
        """
        if not self._accepting:
            raise EngineStoppedError("the engine is not running")
        if not self.is_healthy:
            raise NoReplicaError("no replica is up; they are being started again")
        num_outputs, most = len(prompts) * params.n, self.config.max_queue
        check_room(num_outputs, self._num_unfinished, most, len(self.table.replicas))
        asked = [self._intake.request(p, params, priority, cache_salt, slo, age_s) for p in prompts]
        handles = []
        for text, request in asked:
            flight = Flight.of(request)
            handle = FlightHandle(flight, text, self._abort)
            self._flights[request.request_id] = flight
            self._handles[request.request_id] = handle
            self._num_unfinished += request.params.n
            self._place(flight)
            handles.append(handle)
        return handles

    # --- replicas ---

    def replicas(self) -> list[ReplicaReport]:
        """Return the state of each replica, for people and programs."""
        # A list first, because metrics are read from another thread.
        running = Counter(flight.replica for flight in list(self._flights.values()))
        return [replica.describe(running[replica.number]) for replica in self.table.replicas]

    async def drain(self, number: int) -> None:
        """Send a replica no more requests; returns when its last request has ended."""
        replica = self.table.replicas[number]
        if replica.state is ReplicaState.UP:
            replica.enter(ReplicaState.DRAINING)
            self._settle(replica)
        while replica.state is ReplicaState.DRAINING:
            await self._next_change()

    async def resume(self, number: int) -> None:
        """Let a drained or draining replica take requests again."""
        replica = self.table.replicas[number]
        if replica.state in (ReplicaState.DRAINING, ReplicaState.DRAINED):
            replica.enter(ReplicaState.UP)
            self._land_grounded()
            self._tell_change()

    async def restart(self, number: int) -> None:
        """Drain a replica, end its process, and return when the next process is up.

        This process's watcher starts the next process; on another machine that machine does.

        Raises:
            InvalidRequestError: if the replica is resumed while it drains.
            ReplicaLostError: if no new process joins within `RESTART_S` seconds.
        """
        replica, watcher = self.table.replicas[number], self._watchers.get(number)
        await self.drain(number)
        if replica.is_up:
            raise InvalidRequestError(f"replica {number} was resumed while it drained")
        if replica.is_connected:
            self.table.dismiss(replica, again=True)
            if watcher is not None:
                await watcher.await_end()
        try:
            async with asyncio.timeout(RESTART_S):
                while not replica.is_up:
                    await self._next_change()
        except TimeoutError:
            raise ReplicaLostError(
                f"replica {number} did not come back within {RESTART_S:g} s; see the log"
            ) from None

    def _absent(self) -> set[int]:
        """Return the numbers of the replicas that take no requests."""
        return {r.number for r in self.table.replicas if r.state is not ReplicaState.UP}

    def _joined(self, replica: Replica, hello: m.Hello) -> None:
        if self._service is None:
            model = PerfModel(hello.pieces, margin=hello.margin)
            intake = Intake(
                self.config,
                self.tokenizer,
                max_model_len=hello.max_model_len,
                vocab_size=hello.vocab_size,
                clock=time.monotonic,
                sampling_defaults=self.sampling_defaults,
            )
            intake.perf_model = model
            router = make_router(self._settings.router, len(self.table.replicas), model)
            lengths = make_length_estimator(self.config.length_estimator)
            placement = FlightPlacement(router, lengths, self._settings.hop_limit)
            self._service = _Service(intake, placement)
        self._placement.joined(replica)
        self._land_grounded()
        self._tell_change()

    def _lost(self, replica: Replica, error: Exception) -> None:
        """Place a lost replica's requests elsewhere; they continue after the tokens that clients
        have.
        """
        if replica.number in self._watchers:
            self._watchers[replica.number].kill()
        for flight in list(self._flights.values()):
            if flight.replica != replica.number:
                continue
            flight.replica, flight.moving_to = None, None
            flight.num_losses += 1
            if flight.num_losses > MOST_LOSSES:
                self._end(flight, FinishReason.ERROR, GenerationError(_SUSPECT))
                continue
            self.routing.num_resumed += 1
            self._place(flight)
        self._tell_change()

    def _land_grounded(self) -> None:
        grounded, self._grounded = self._grounded, {}
        for request_id, flight in grounded.items():
            if request_id in self._flights:
                self._place(flight)

    def _settle(self, replica: Replica) -> None:
        """Mark a draining replica as drained once it has no request left."""
        if replica.state is ReplicaState.DRAINING and not any(
            flight.replica == replica.number for flight in self._flights.values()
        ):
            replica.enter(ReplicaState.DRAINED)
            self._tell_change()

    # --- requests ---

    def _place(self, flight: Flight, number: int | None = None) -> None:
        """Send a request to a replica, by default to the replica that the router chooses."""
        absent, ask = self._absent(), self._placement.ask(flight)
        if number is None or number in absent:
            if len(absent) == len(self.table.replicas):
                flight.replica = None
                self._grounded[flight.request.request_id] = flight
                return
            number = self._placement.choose(ask, absent)
        flight.replica = number
        self.table.replicas[number].submit(flight.submit(time.monotonic()), ask)
        self._placement.placed(flight, number)

    def _told(self, replica: Replica, message: m.News | m.Heartbeat | m.Withdrawn) -> None:
        match message:
            case m.Withdrawn():
                self._move(message.request_id, replica)
            case m.Heartbeat():
                self._placement.reported(replica)
            case m.News():
                self._take_news(replica, message)
        self._settle(replica)

    def _take_news(self, replica: Replica, news: m.News) -> None:
        for delta in news.deltas:
            if (flight := self._flight_on(replica, delta.request_id)) is not None:
                self._deliver(flight, delta)
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

    def _deliver(self, flight: Flight, delta: OutputDelta) -> None:
        if isinstance(delta.error, SLOUnattainableError) and self._retried(flight):
            return
        now = time.monotonic()
        flight.moving_to = None
        flight.note(delta, now)
        self._handles[delta.request_id].put(delta)
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._placement.ended(flight, delta.index)
        if not flight.num_open:
            self._forget(flight)

    def _retried(self, flight: Flight) -> bool:
        """Return True if another replica is now asked for a request that this replica refuses.

        Either all outputs of a request are refused or none, so the client is told all or nothing.
        """
        if flight.has_begun or flight.replica is None:
            return False
        other = self._placement.better_than(flight.replica, flight, self._absent())
        if other is None:
            return False
        self._hop(flight, other)
        return True

    def _look_elsewhere(self, flight: Flight, replica: Replica) -> None:
        """Ask a replica to give back a request without a promise, if another replica may promise
        it.
        """
        if flight.moving_to is not None or flight.has_begun:
            return
        other = self._placement.better_than(replica.number, flight, self._absent())
        if other is not None:
            flight.moving_to = other
            replica.post(m.Withdraw(flight.request.request_id))

    def _move(self, request_id: str, replica: Replica) -> None:
        """Send on a request that a replica has given back."""
        if (flight := self._flight_on(replica, request_id)) is not None:
            self._hop(flight, flight.moving_to)

    def _hop(self, flight: Flight, other: int | None) -> None:
        flight.moving_to = None
        self.routing.num_hops += 1
        self._place(flight, other)

    def _abort(self, request_id: str) -> None:
        """End a request because its client has left."""
        flight = self._flights.get(request_id)
        if flight is not None:
            self._end(flight, FinishReason.ABORT, None)

    def _end(self, flight: Flight, reason: FinishReason, error: Exception | None) -> None:
        """End a request for a reason that lies with the controller, not with the replica."""
        request_id = flight.request.request_id
        handle = self._handles[request_id]
        for delta in ending(flight, reason, error):
            handle.put(delta)
        self._num_unfinished -= flight.num_open
        if flight.replica is not None:
            self.table.replicas[flight.replica].post(m.Abort(request_id))
        self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        del self._flights[flight.request.request_id], self._handles[flight.request.request_id]
        if not self._flights:
            self._tell_change()

    # --- waiting ---

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self) -> None:
        """Wait until a replica joins, is lost or is drained, or until the last request ends."""
        await self._changed.wait()


def _log_failure(task: asyncio.Task[None]) -> None:
    """Log why a replica cannot be started; the others serve on without it."""
    if not task.cancelled() and task.exception() is not None:
        log.error("%s", task.exception())
