"""Replicas that tests play: what a controller would send is kept, and what they say is said here."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from hellos import hello

from minserve.controller import messages as m
from minserve.controller.controller import Controller
from minserve.controller.flights import FlightHandle
from minserve.controller.replicas import ReplicaState
from minserve.errors import ReplicaLostError
from minserve.outputs import OutputDelta
from minserve.planner.replica_load import ReplicaLoad
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO

PROMPT = list(range(5, 105))
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
PROMISE = SLO(ttft=1.0, tpot=0.1)
FULL = ReplicaLoad(prefill_tokens=10**6, free_tokens=0, num_sequences=50)
IDLE = ReplicaLoad(free_tokens=10**5)


class Outbox:
    """Stands where the connection to a replica would be."""

    def __init__(self) -> None:
        self.sent: list[m.Message] = []

    def post(self, data: bytes) -> None:
        self.sent.append(m.decode(data))

    def close(self) -> None:
        pass


def join(controller: Controller, number: int) -> Outbox:
    """A replica comes; also one that was there before."""
    replica, outbox = controller.table.replicas[number], Outbox()
    replica.mailbox, replica.hello, replica.load = outbox, hello(load=IDLE), IDLE
    replica.epoch, replica.num_submitted = replica.epoch + 1, 0
    replica.under_way.clear()
    replica.enter(ReplicaState.UP)
    controller._joined(replica, replica.hello)
    return outbox


def lose(controller: Controller, number: int, error: Exception | None = None) -> None:
    """A replica is lost, without a known fault of its own if no other error is given."""
    replica = controller.table.replicas[number]
    controller.table.give_up(replica, error or ReplicaLostError("killed"))


Test = Callable[[Controller, list[Outbox]], Coroutine[Any, Any, None]]


def submit(controller: Controller, slo: SLO | None = PROMISE, **more: Any) -> FlightHandle:
    return controller.submit([PROMPT], PARAMS, slo=slo, **more)[0]


def where(controller: Controller, handle: FlightHandle) -> int:
    number = controller._dispatcher._flights[handle.request_id].replica
    assert handle.replica == number
    return number


def say(controller: Controller, number: int, message: m.News | m.Heartbeat | m.Withdrawn) -> None:
    controller.table._hear(controller.table.replicas[number], message)


def tokens(handle: FlightHandle, *token_ids: int, **more: Any) -> m.News:
    return m.News(deltas=(OutputDelta(handle.request_id, 0, token_ids=token_ids, **more),))


def submitted(outbox: Outbox) -> list[m.Submit]:
    return [one for one in outbox.sent if isinstance(one, m.Submit)]


def report(controller: Controller, number: int, load: ReplicaLoad) -> None:
    sent = controller.table.replicas[number].num_submitted
    say(controller, number, m.News(load=load, num_taken=sent))
