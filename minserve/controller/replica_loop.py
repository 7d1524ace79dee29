"""A replica's process: an engine, and the connection to the controller that feeds it.

It is one loop, as in every engine: take in the controller's messages, run one iteration, send
its outcome. The process lives for one connection. If the connection is lost, no result can
reach a client, so the process ends, and its watcher starts the next one.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from minserve import __version__
from minserve.controller import messages as m
from minserve.controller.channel import MAX_MESSAGE, REPLICA, Channel, Mailbox, pair_store
from minserve.controller.rendezvous import announce, local_address
from minserve.controller.replica_process import ReplicaSpec
from minserve.engine.core import IDLE_S
from minserve.engine.live_output import History
from minserve.engine.relay import RelayEngine
from minserve.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    MinserveError,
    ProtocolError,
    RankLostError,
    ReplicaLostError,
    ReplicaRefusedError,
)
from minserve.exit_codes import EXIT_AGAIN, EXIT_ERROR, EXIT_FAULT, EXIT_LOST, EXIT_REFUSED
from minserve.log_lines import set_up_logs
from minserve.outputs import OutputDelta
from minserve.planner.replica_load import ReplicaLoad
from minserve.request import FinishReason

log = logging.getLogger(__name__)

# Seconds between signs of life.
BEAT_S = 0.25
JOIN_S = 120.0


def identity_of(engine: RelayEngine) -> m.Identity:
    """Return the identity that the controller compares between replicas.

    It holds all properties that decide which requests an engine takes, what it promises, and which
    tokens come out. Other properties may differ from replica to replica.
    """
    traits = {
        "model": f"{engine.model_name} ({engine.fingerprint})",
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.config.kv_cache_dtype,
        "tokenizer": engine.config.tokenizer or "the model's",
        "max_model_len": str(engine.max_model_len),
        "policy": engine.config.policy,
        "deterministic": str(engine.config.deterministic).lower(),
    }
    return m.Identity(protocol=m.PROTOCOL, version=__version__, traits=traits)


class ReplicaLoop:
    """Serves one connection to the controller.

    Args:
        engine: loaded and profiled.
        watchdog_s: as in `ReplicaSpec`.
    """

    def __init__(self, engine: RelayEngine, channel: Channel, watchdog_s: float) -> None:
        self._engine, self._watchdog_s = engine, watchdog_s
        # Each message with the time at which it came: it waits here for the end of an iteration.
        self._inbox: queue.SimpleQueue[tuple[float, m.Message | Exception]] = queue.SimpleQueue()
        self._mailbox = Mailbox(
            channel,
            self._receive,
            lambda error: self._inbox.put((engine.clock_s, error)),
            name="controller",
        )
        engine.call_when_lost(lambda error: self._inbox.put((engine.clock_s, error)))
        self._num_taken = 0
        self._stand(engine.load())
        self._stopped = threading.Event()

    def run(self) -> m.Stop:
        """Serve until the controller sends `Stop`, and return that message.

        Raises:
            ReplicaLostError: if the connection is lost.
            ProtocolError: if the controller sends a message that no controller should send.
            DeviceLostError: if the device is lost.
            PoolCorruptedError: if the engine has lost count of its blocks.
        """
        self._mailbox.start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        try:
            while (stop := self._take_in()) is None:
                deltas, declined, load = self._engine.step()
                self._stand(load)
                self._tell_news(deltas, tuple(declined))
            return stop
        finally:
            self._stopped.set()
            self._mailbox.close()

    def _receive(self, data: bytes) -> None:
        """Take a message from the receiving thread: a look is answered there, the others wait."""
        message = m.decode(data)
        if isinstance(message, m.Look):
            activity = self._engine.activity(message.since)
            self._tell(m.encode(m.Seen(number=message.number, activity=activity)))
        else:
            self._inbox.put((self._engine.clock_s, message))

    def _take_in(self) -> m.Stop | None:
        """Carry out the messages since the last iteration; waits for one where there is no work."""
        while not self._engine.has_work or not self._inbox.empty():
            came_s, asked = self._next_wish()
            if isinstance(asked, Exception):
                raise asked
            if isinstance(asked, m.Stop):
                return asked
            self._carry_out(asked, came_s)
        return None

    def _next_wish(self) -> tuple[float, m.Message | Exception]:
        """Wait for the next message and return it with the time at which it came.

        While it waits, it checks the books of the block pool and refines a rough profile.
        """
        since = time.monotonic()
        with suppress(queue.Empty):
            return self._inbox.get(timeout=IDLE_S)
        self._engine.check_integrity()
        while True:
            rest_s = self._engine.refine(time.monotonic() - since, lambda: not self._inbox.empty())
            with suppress(queue.Empty):
                return self._inbox.get(timeout=rest_s)

    def _carry_out(self, asked: m.Message, came_s: float) -> None:
        match asked:
            case m.Submit():
                self._add(asked, came_s)
            case m.Abort():
                if asked.has_all:
                    deltas = self._engine.complete(asked.request_id)
                else:
                    self._engine.abort(asked.request_id)
                    deltas = []  # this client no longer listens
                self._stand(self._engine.load())
                self._tell_news(deltas, ())
            case m.Withdraw():
                if self._engine.withdraw(asked.request_id):
                    self._stand(self._engine.load())
                    self._tell(m.encode(m.Withdrawn(asked.request_id)))
            case _:
                raise ProtocolError(f"the controller sent {type(asked).__name__}")

    def _add(self, asked: m.Submit, came_s: float) -> None:
        self._num_taken += 1
        histories = {
            index: History(
                one.token_ids, tuple(came_s - age for age in one.ages_s), one.told_prompt
            )
            for index, one in asked.outputs.items()
        }
        try:
            self._engine.add(replace(asked.request, arrival_s=came_s - asked.age_s), histories)
        except InvalidRequestError as error:
            self._stand(self._engine.load())
            self._tell_news(_failed(asked.request.request_id, asked.outputs, error), ())

    def _stand(self, load: ReplicaLoad) -> None:
        # One new object replaces the old one, because the beat reads it from another thread.
        self._standing = (load, self._num_taken)

    def _tell_news(self, deltas: list[OutputDelta], declined: tuple[str, ...]) -> None:
        """Send the outcome of an iteration.

        A request ends with an error if one of its deltas is longer than a message may be.
        """
        load, num_taken = self._standing
        data = m.encode(
            m.News(deltas=tuple(deltas), declined=declined, load=load, num_taken=num_taken)
        )
        if len(data) <= MAX_MESSAGE:
            self._tell(data)
        elif len(deltas) > 1:
            for delta in deltas:
                self._tell_news([delta], declined)
        else:
            (delta,) = deltas
            error = GenerationError(
                f"the log probabilities of this prompt take {len(data)} bytes; at most "
                f"{MAX_MESSAGE} can be told, so ask for fewer"
            )
            ended = self._engine.abort(delta.request_id) or [delta]
            indices = {delta.index, *(one.index for one in ended)}
            self._tell_news(_failed(delta.request_id, indices, error), declined)

    def _tell(self, data: bytes) -> None:
        self._mailbox.post(data)

    def _beat(self) -> None:
        """Send signs of life with statistics; the last of them tells of an iteration that hangs."""
        while not self._stopped.wait(BEAT_S):
            if (iteration_s := self._engine.iteration_s) > self._watchdog_s:
                self._tell(m.encode(m.Hung(iteration_s)))
                return
            # While nothing goes out, what waits to be sent is sign enough: signs must not pile up.
            if not self._mailbox.is_sending:
                load, num_taken = self._standing
                stats = m.Heartbeat(stats=self._engine.snapshot(), load=load, num_taken=num_taken)
                self._tell(m.encode(stats))


def _failed(request_id: str, indices: Iterable[int], error: MinserveError) -> list[OutputDelta]:
    return [
        OutputDelta(request_id, index, finish_reason=FinishReason.ERROR, error=error)
        for index in indices
    ]


def connect(spec: ReplicaSpec, engine: RelayEngine) -> Channel:
    """Announce an engine to the controller and return the channel once it is accepted.

    Raises:
        ConfigError: if the engine does not know its device's speed.
        ReplicaLostError: if no controller answers.
        ReplicaRefusedError: if the controller refuses this replica; it holds the reason.
        ProtocolError: if the controller answers with another message.
    """
    model = engine.perf_model
    if model is None:
        raise ConfigError("a replica must be profiled before it joins, for its router")
    meeting = announce(spec.store_host, spec.store_port, spec.index)
    channel = Channel(
        pair_store(meeting.store, spec.index, meeting.epoch),
        REPLICA,
        address=local_address(spec.store_host, spec.store_port),
        patience_s=float("inf"),
        join_s=JOIN_S,
    )
    channel.send(
        m.encode(
            m.Hello(
                identity=identity_of(engine),
                pid=os.getpid(),
                host=socket.gethostname(),
                model_name=engine.model_name,
                max_model_len=engine.max_model_len,
                vocab_size=engine.vocab_size,
                load=engine.load(),
                pieces=tuple(model.pieces),
                margin=model.margin,
                mixed=model.mixed,
            )
        )
    )
    answer = m.decode(channel.receive())
    if isinstance(answer, m.Refused):
        raise ReplicaRefusedError(answer.why)
    if not isinstance(answer, m.Welcome):
        raise ProtocolError(f"the controller answered with {type(answer).__name__}")
    return channel


def run_replica(spec: ReplicaSpec) -> int:
    """Run one replica and return the exit code of its process."""
    set_up_logs(spec.log_format, replica=spec.index)
    try:
        engine = RelayEngine(**spec.settings)
        engine.warm_up()
        if engine.perf_model is None:
            engine.profile(spec.profile_s, progress=spec.is_alone)
        if spec.is_alone and (unkept := engine.unattainable_classes()):
            log.warning("%s", unkept)
        channel = connect(spec, engine)
    except ReplicaLostError as error:
        log.error("%s", error)
        return EXIT_LOST
    except RankLostError as error:
        log.error("%s", error)
        return EXIT_ERROR if error.by_fault else EXIT_LOST
    except ReplicaRefusedError as error:
        log.error("refused: %s", error)
        return EXIT_REFUSED
    except MinserveError as error:
        log.error("%s", error)
        return EXIT_ERROR
    try:
        stop = ReplicaLoop(engine, channel, spec.watchdog_s).run()
        engine.keep_profile()
    except (ReplicaLostError, ProtocolError) as error:
        log.error("%s", error)
        return EXIT_LOST
    except RankLostError as error:
        log.error("%s", error)
        return EXIT_FAULT if error.by_fault else EXIT_LOST
    except MinserveError as error:
        log.error("%s", error)
        return EXIT_FAULT
    return EXIT_AGAIN if stop.again else 0
