"""One placement for the controller's flights and the simulator's turns."""

from __future__ import annotations

import math

import pytest

from minserve.controller.flight_placement import FlightPlacement
from minserve.controller.flights import Flight
from minserve.controller.placement import Placement
from minserve.controller.router import Ask, Router, SloRouter
from minserve.planner.predict.lengths import QuantileLengths
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.planner.replica_load import ReplicaLoad
from minserve.request import Request
from minserve.sampling_params import SamplingParams
from minserve.simulator.cluster import TurnPlacement
from minserve.simulator.events import EventLoop
from minserve.simulator.simulated_sequence import SimulatedSequence, outputs_of
from minserve.slo.objectives import SLO
from minserve.workload.conversation import Turn

MODEL = PerfModel([Piece(tokens=1e-4, base=0.02)])
IDLE = ReplicaLoad(free_tokens=10_000)
PROMISE = SLO(ttft=1.0, tpot=0.1)


def request(slo: SLO | None = PROMISE) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=(5,) * 100,
        params=SamplingParams(n=2, max_tokens=20),
        seed=0,
        arrival_s=3.0,
        slo=slo,
        targets=None if slo is None else slo.resolve(1.0, 1.0),
    )


def turn(asked: Request) -> SimulatedSequence:
    what = Turn(slo=PROMISE, prompt_tokens=100, output_tokens=8, n=2)
    return outputs_of(asked, what, conversation=4)[0]


def flights(router: Router, limit: int = 2) -> tuple[FlightPlacement, Flight]:
    return FlightPlacement(router, QuantileLengths(), limit), Flight.of(request())


def turns(router: Router, limit: int = 2) -> tuple[TurnPlacement, SimulatedSequence]:
    return TurnPlacement(router, QuantileLengths(), limit, EventLoop()), turn(request())


def router_of(number: int) -> SloRouter:
    router = SloRouter(number, MODEL)
    for replica in range(number):
        router.report(replica, IDLE)
    return router


def test_a_flight_and_a_turn_ask_for_the_same() -> None:
    (placement, flight), (simulated, seq) = flights(router_of(2)), turns(router_of(2))
    asked = placement.ask(flight)
    assert asked == simulated.ask(seq)
    assert (asked.prompt_tokens, asked.deadline_s, asked.tpot_s) == (100, 4.0, 0.1)
    without = placement.ask(Flight.of(request(slo=None)))
    assert (without.deadline_s, without.tpot_s) == (math.inf, math.inf)


def test_a_deadline_of_the_whole_answer_asks_for_a_pace_too() -> None:
    placement, loop = TurnPlacement(router_of(2), QuantileLengths(), 2, EventLoop()), EventLoop()
    assert loop.now == 0.0
    asked = placement.ask(turn(request(SLO(finish=2.0, expected_output_tokens=11))))
    # By then ten further tokens at that pace still end in time, which began at 3.0.
    assert asked.deadline_s > 3.0
    assert asked.deadline_s + 10 * asked.tpot_s == pytest.approx(5.0)
    assert 0.02 < asked.tpot_s <= 0.1
    both = placement.ask(turn(request(SLO(finish=2.0, ttft=0.1, expected_output_tokens=11))))
    assert (both.deadline_s, both.tpot_s) == (3.1, asked.tpot_s)


def test_a_turn_knows_the_replica_of_the_turn_before() -> None:
    placement, _ = turns(router_of(2))
    what = Turn(slo=PROMISE, prompt_tokens=100, output_tokens=8, shared_tokens=60)
    (seq,) = outputs_of(request(), what, conversation=4)
    placement.homes[4] = 1
    assert placement.ask(seq).cached_tokens == {1: 60}


class CertainRouter(SloRouter):
    """Believes that any replica can keep any SLO."""

    def choose_better(self, ask: Ask, now: float, without: frozenset[int]) -> int | None:
        return min(set(range(self.num_replicas)) - without, default=None)


@pytest.mark.parametrize("make", [flights, turns])
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_request_moves_on_up_to_the_limit_and_never_back(make, limit: int) -> None:
    placement, one = make(CertainRouter(6, MODEL), limit)
    at, seen = 0, [0]
    while (other := placement.better_than(at, one)) is not None:
        at = other
        seen.append(at)
    assert seen == list(range(limit + 1))
    assert one.tried == set(seen)


@pytest.mark.parametrize("make", [flights, turns])
def test_replicas_that_take_no_requests_are_not_tried(make) -> None:
    placement, one = make(CertainRouter(4, MODEL))
    assert placement.better_than(0, one, absent={1, 2}) == 3
    placement, one = make(CertainRouter(4, MODEL))
    assert placement.better_than(0, one, absent={1, 2, 3}) is None


@pytest.mark.parametrize("make", [flights, turns])
def test_requests_under_way_count_as_load(make) -> None:
    placement: Placement
    placement, one = make(router_of(2))
    asked = placement.ask(one)
    placement.report(0, IDLE, [asked] * 5)
    assert placement.choose(asked) == 1
    placement.report(0, IDLE)
    assert placement.choose(asked) == 0
