"""`Controller`: several replicas that act as one engine.

It checks requests, routes each to a replica, and hands on the tokens that come back. It keeps
what a client was sent until the request ends, so that another replica can continue the request
if the first replica is lost. All methods belong to one asyncio loop; none of them blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from minserve.activity import Activity, Cursor
from minserve.config import EngineConfig
from minserve.controller import messages as m
from minserve.controller.dispatcher import Dispatcher, RoutingStats
from minserve.controller.flight_placement import FlightPlacement
from minserve.controller.flights import FlightHandle
from minserve.controller.lookout import Lookout
from minserve.controller.processes import STOP_S, Watcher
from minserve.controller.rendezvous import Rendezvous
from minserve.controller.replicas import Replica, ReplicaState, ReplicaTable
from minserve.controller.router import make_router
from minserve.engine.intake import Intake, check_room, load_front, warm_up_chats
from minserve.engine.stats import EngineStats
from minserve.engine.text.inputs import PromptProcessor
from minserve.errors import (
    EngineStoppedError,
    InvalidRequestError,
    NoReplicaError,
    ReplicaLostError,
)
from minserve.outputs import ReplicaReport
from minserve.planner.predict.lengths import make_length_estimator
from minserve.planner.predict.perf_model import PerfModel
from minserve.process_config import ControllerConfig
from minserve.prompts import BadWordIds, Prompt
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO
from minserve.slo.task_table import TaskOutcome

log = logging.getLogger(__name__)

# Seconds for a new process to load the model and join.
RESTART_S = 600.0


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
            told=lambda replica, message: self._dispatcher.told(replica, message),
            seen=lambda answer: self._lookout.take(answer),
            lost=self._lost,
        )
        self._dispatcher = Dispatcher(self.table.replicas, self._watchers, self._tell_change)
        self._lookout = Lookout(self.table.replicas)
        self._service: _Service | None = None
        self._accepting = False
        self._changed = asyncio.Event()

    @property
    def _intake(self) -> Intake:
        if self._service is None:
            raise NoReplicaError("no replica has come yet; they are being started")
        return self._service.intake

    @property
    def routing(self) -> RoutingStats:
        """How often requests moved between replicas."""
        return self._dispatcher.stats

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
    def task_outcomes(self) -> Mapping[TaskOutcome, int]:
        """The number of agents' tasks by outcome since the start."""
        if self._service is None:
            return dict.fromkeys(TaskOutcome, 0)
        return self._service.intake.tasks.table.outcomes

    @property
    def num_unfinished(self) -> int:
        """Outputs that wait or run."""
        return self._dispatcher.num_unfinished

    @property
    def is_healthy(self) -> bool:
        """True while requests are accepted and at least one replica takes them."""
        return self._accepting and len(self._dispatcher.absent()) < len(self.table.replicas)

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

    async def activity_by_replica(self, since: Mapping[str, Cursor]) -> Mapping[str, Activity]:
        """Return what each replica did since a look; one that does not answer soon is left out."""
        return await self._lookout.look(since)

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
        warming = asyncio.create_task(
            asyncio.to_thread(warm_up_chats, self.tokenizer, self.config.model)
        )
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
        await warming
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
                while self._dispatcher.has_flights:
                    await self._next_change()
        except TimeoutError:
            log.warning("aborting %d unfinished outputs", self.num_unfinished)
        self._dispatcher.end_all(EngineStoppedError("the server is shutting down"))
        # A replica that is still loading was not told to stop, and has no request to lose.
        patience_s = {r.number: STOP_S if r.is_connected else 0.0 for r in self.table.replicas}
        # At once, because a stopped process keeps its connection until its watcher kills it.
        await asyncio.gather(
            self.table.close(),
            *(watcher.stop(patience_s[number]) for number, watcher in self._watchers.items()),
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
        bad_word_ids: BadWordIds | None = None,
        client: str = "",
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
        check_room(num_outputs, self.num_unfinished, most, len(self.table.replicas))
        asked = [
            self._intake.request(p, params, priority, cache_salt, slo, age_s, bad_word_ids)
            for p in prompts
        ]
        tasks = self._intake.tasks
        requests = tasks.join([request for _, request in asked], client)
        return [
            self._dispatcher.start(request, text, tasks.watch(request))
            for (text, _), request in zip(asked, requests, strict=True)
        ]

    # --- replicas ---

    def replicas(self) -> list[ReplicaReport]:
        """Return the state of each replica, for people and programs."""
        running = self._dispatcher.num_by_replica()
        return [replica.describe(running[replica.number]) for replica in self.table.replicas]

    async def drain(self, number: int) -> None:
        """Send a replica no more requests; returns when its last request has ended."""
        replica = self.table.replicas[number]
        if replica.state is ReplicaState.UP:
            replica.enter(ReplicaState.DRAINING)
            self._dispatcher.settle(replica)
        while replica.state is ReplicaState.DRAINING:
            await self._next_change()

    async def resume(self, number: int) -> None:
        """Let a drained or draining replica take requests again."""
        replica = self.table.replicas[number]
        if replica.state in (ReplicaState.DRAINING, ReplicaState.DRAINED):
            replica.enter(ReplicaState.UP)
            self._dispatcher.land_grounded()
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

    def _joined(self, replica: Replica, hello: m.Hello) -> None:
        if self._service is None:
            model = PerfModel(hello.pieces, margin=hello.margin, mixed=hello.mixed)
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
        self._dispatcher.joined(replica, self._service.placement)
        self._tell_change()

    def _lost(self, replica: Replica, error: Exception) -> None:
        self._dispatcher.lost(replica, error)
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
