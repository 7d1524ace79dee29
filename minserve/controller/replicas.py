"""`ReplicaTable`: the replicas, the state of each, and the connection to each.

::

    STARTING ──joins──► UP ──drain──► DRAINING ──idle──► DRAINED
        ▲               │  ▲              │                 │
        └─────lost──────┴──┼──────lost────┘                 │
                           └───────────resume──────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from minserve import __version__
from minserve.controller import messages as m
from minserve.controller.channel import CONTROLLER, Channel, Mailbox, pair_store
from minserve.controller.rendezvous import Arrival, Rendezvous
from minserve.controller.router import Ask
from minserve.engine.stats import EngineStats
from minserve.errors import (
    MinserveError,
    ProtocolError,
    ReplicaHungError,
    ReplicaRefusedError,
)
from minserve.outputs import ReplicaReport
from minserve.planner.replica_load import ReplicaLoad

log = logging.getLogger(__name__)

POLL_S = 0.05
JOIN_S = 30.0
# Seconds for a replica to end once it is told to.
LEAVE_S = 1.0


class ReplicaState(Enum):
    """The state of a replica, as drawn above."""

    STARTING = "starting"
    UP = "up"
    DRAINING = "draining"
    DRAINED = "drained"


@dataclass(slots=True)
class Replica:
    """A replica as the controller knows it.

    Attributes:
        epoch: of the process that is connected, or was connected last.
        hello: the first message of that process.
        load, stats: as the replica reported them last.
        under_way: requests sent to it that its reported load does not yet include, each with the
            number of its submission.
        num_submitted: requests sent to the process that is connected.
        num_routed: requests ever sent to the replica.
        num_lost: processes of the replica that were lost.
        since_s: when it entered its state, in seconds of ``time.monotonic``.
    """

    number: int
    epoch: int = 0
    state: ReplicaState = ReplicaState.STARTING
    mailbox: Mailbox | None = None
    hello: m.Hello | None = None
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    stats: EngineStats = field(default_factory=EngineStats)
    under_way: deque[tuple[int, Ask]] = field(default_factory=deque)
    num_submitted: int = 0
    num_routed: int = 0
    num_lost: int = 0
    since_s: float = field(default_factory=time.monotonic)

    @property
    def is_connected(self) -> bool:
        return self.mailbox is not None

    @property
    def is_up(self) -> bool:
        return self.state is ReplicaState.UP

    def describe(self, num_requests: int) -> ReplicaReport:
        """How it stands, for people and programs; so many requests are with it now."""
        process = self.hello if self.is_connected else None
        return {
            "replica": self.number,
            "state": self.state.value,
            "for_s": round(time.monotonic() - self.since_s, 1),
            "pid": None if process is None else process.pid,
            "host": None if process is None else process.host,
            "requests": num_requests,
            "routed": self.num_routed,
            "lost": self.num_lost,
        }

    def enter(self, state: ReplicaState) -> None:
        """Enter a state and note the time."""
        self.state, self.since_s = state, time.monotonic()

    def submit(self, message: m.Submit, ask: Ask) -> None:
        """Send a request to the replica."""
        self.num_submitted += 1
        self.num_routed += 1
        self.under_way.append((self.num_submitted, ask))
        self.post(message)

    def report(self, load: ReplicaLoad, num_taken: int) -> None:
        """Take the load that the replica reports after so many submissions."""
        self.load = load
        while self.under_way and self.under_way[0][0] <= num_taken:
            self.under_way.popleft()

    def post(self, message: m.Message) -> None:
        """Send a message, if the replica is connected."""
        if self.mailbox is not None:
            self.mailbox.post(m.encode(message))


class ReplicaTable:
    """Connects replicas as they come, and notices when they go.

    Args:
        patience_s: seconds of silence after which a replica is given up.
        joined: called on the loop when a replica may be sent requests, with what it said of
            itself.
        told: called on the loop with each message of a connected replica that is about requests.
        seen: called on the loop with its answer to a look.
        lost: called on the loop when the connection to a replica is lost.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        num_replicas: int,
        patience_s: float,
        *,
        joined: Callable[[Replica, m.Hello], None],
        told: Callable[[Replica, m.News | m.Heartbeat | m.Withdrawn], None],
        seen: Callable[[m.Seen], None],
        lost: Callable[[Replica, Exception], None],
    ) -> None:
        self.replicas = [Replica(number) for number in range(num_replicas)]
        self._rendezvous, self._patience_s = rendezvous, patience_s
        self._joined, self._told, self._lost, self._seen = joined, told, lost, seen
        self._identity: m.Identity | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to connect replicas as they register."""
        self._run(self._watch())

    def open_to_others(self) -> None:
        """Let replicas of other machines join, since the first replica is up."""
        self._rendezvous.open()

    async def close(self) -> None:
        """Connect no more replicas, and tell the connected ones to end."""
        for task in self._tasks:
            task.cancel()
        mailboxes = [r.mailbox for r in self.replicas if r.mailbox is not None]
        for replica in self.replicas:
            self.dismiss(replica, again=False)
        # The channel of a hung replica gives up after its patience.
        wait_s = self._patience_s + LEAVE_S
        await asyncio.gather(*(asyncio.to_thread(one.join, wait_s) for one in mailboxes))

    def dismiss(self, replica: Replica, *, again: bool) -> None:
        """Tell a replica's process to end; it counts as gone at once.

        Args:
            again: true if another process shall take its place.
        """
        if replica.mailbox is not None:
            replica.post(m.Stop(again))
            replica.mailbox.close()
            replica.mailbox = None
        replica.enter(ReplicaState.STARTING)

    def give_up(self, replica: Replica, error: Exception) -> None:
        """Count a replica as lost: later messages of its process are ignored."""
        if replica.mailbox is None:
            return
        log.warning("replica %d is lost: %s", replica.number, error)
        replica.mailbox.close()
        replica.mailbox = None
        replica.num_lost += 1
        replica.enter(ReplicaState.STARTING)
        self._lost(replica, error)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        while True:
            try:
                for arrival in await asyncio.to_thread(self._rendezvous.arrivals):
                    self._run(self._take_in(arrival))
            except RuntimeError as error:  # another program has changed the store
                log.warning("the store of replicas is in disorder: %s", error)
            await asyncio.sleep(POLL_S)

    async def _take_in(self, arrival: Arrival) -> None:
        """Connect a replica if it fits the others, else refuse it."""
        replica = self.replicas[arrival.replica]
        try:
            channel, hello = await asyncio.to_thread(self._open, arrival)
            self._check(replica, arrival, hello)
        except ReplicaRefusedError as error:
            log.error("replica %d is not taken in: %s", arrival.replica, error)
            with suppress(MinserveError):
                await asyncio.to_thread(channel.send, m.encode(m.Refused(str(error))))
            return
        except MinserveError as error:
            log.warning("replica %d did not join: %s", arrival.replica, error)
            return
        if replica.mailbox is not None:
            self.give_up(replica, ProtocolError("another process has taken its place"))
        try:
            self._connect(replica, arrival.epoch, channel, hello)
        except Exception as error:  # what it says of itself makes no sense
            log.exception("replica %d cannot be used", arrival.replica)
            self.give_up(replica, ProtocolError(f"{type(error).__name__}: {error}"))
        else:
            self._identity = self._identity or hello.identity

    def _open(self, arrival: Arrival) -> tuple[Channel, m.Hello]:
        store = self._rendezvous.store.clone()  # type: ignore[attr-defined]  # not in torch's stubs
        channel = Channel(
            pair_store(store, arrival.replica, arrival.epoch),
            CONTROLLER,
            address=self._rendezvous.host,
            patience_s=self._patience_s,
            join_s=JOIN_S,
        )
        hello = m.decode(channel.receive())
        if not isinstance(hello, m.Hello):
            raise ProtocolError(f"its first message was {type(hello).__name__}")
        return channel, hello

    def _check(self, replica: Replica, arrival: Arrival, hello: m.Hello) -> None:
        """Check that a replica's process is the newest and fits the other replicas.

        Raises:
            ReplicaRefusedError: if it differs from the others, or if a later process has its place.
        """
        if arrival.epoch <= replica.epoch:
            raise ReplicaRefusedError("a later process has taken this replica's place")
        own, theirs = self._identity, hello.identity
        if (theirs.protocol, theirs.version) != (m.PROTOCOL, __version__):
            raise ReplicaRefusedError(
                f"it is minserve {theirs.version} with protocol {theirs.protocol}, the controller "
                f"{__version__} with {m.PROTOCOL}"
            )
        if own is None:
            return
        for name, value in own.traits.items():
            if theirs.traits.get(name) != value:
                raise ReplicaRefusedError(
                    f"its {name} is {theirs.traits.get(name)}, that of the others {value}"
                )

    def _connect(self, replica: Replica, epoch: int, channel: Channel, hello: m.Hello) -> None:
        def is_current() -> bool:
            return replica.mailbox is mailbox

        def on_loop(message: m.Message) -> None:
            if is_current():
                self._hear(replica, message)

        def on_lost(error: Exception) -> None:
            if is_current():
                self.give_up(replica, error)

        call = asyncio.get_running_loop().call_soon_threadsafe
        mailbox = Mailbox(
            channel,
            lambda data: call(on_loop, m.decode(data)),
            lambda error: call(on_lost, error),
            name=f"replica-{replica.number}",
        )
        replica.epoch, replica.mailbox, replica.hello = epoch, mailbox, hello
        replica.load, replica.stats = hello.load, EngineStats()
        replica.num_submitted = 0
        replica.under_way.clear()
        replica.post(m.Welcome())
        mailbox.start()
        replica.enter(ReplicaState.UP)
        log.info("replica %d is up (process %d on %s)", replica.number, hello.pid, hello.host)
        self._joined(replica, hello)

    def _hear(self, replica: Replica, message: m.Message) -> None:
        """Take a message of a replica; one that makes no sense ends its connection."""
        try:
            match message:
                case m.News() | m.Heartbeat() | m.Withdrawn():
                    if isinstance(message, m.Heartbeat):
                        replica.stats = message.stats
                    if not isinstance(message, m.Withdrawn) and message.load is not None:
                        replica.report(message.load, message.num_taken)
                    self._told(replica, message)
                case m.Seen():
                    self._seen(message)
                case m.Hung():
                    raise ReplicaHungError(
                        f"an iteration hangs: it has taken {message.iteration_s:.1f} s"
                    )
                case _:
                    raise ProtocolError(f"it sent {type(message).__name__}")
        except (ProtocolError, ReplicaHungError) as error:
            self.give_up(replica, error)
        except Exception as error:  # whatever a message does, it does to its replica alone
            log.exception("replica %d sent what cannot be taken", replica.number)
            self.give_up(replica, ProtocolError(f"{type(error).__name__}: {error}"))
