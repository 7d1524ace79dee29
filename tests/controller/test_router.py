"""Where requests go."""

from __future__ import annotations

import math

import pytest

from minserve import process_config
from minserve.controller.router import ROUTERS, Ask, make_router
from minserve.errors import ConfigError
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.planner.replica_load import ReplicaLoad

MODEL = PerfModel([Piece(tokens=1e-4, base=0.02)])
IDLE = ReplicaLoad(free_tokens=10_000)


def ask(prompt: int = 500, output: int = 100, deadline: float = 0.5, **more: object) -> Ask:
    values = {"prompt_tokens": prompt, "output_tokens": output, "deadline_s": deadline,
              "tpot_s": 0.05}  # fmt: skip
    return Ask(**(values | more))


def slo_router(*states: ReplicaLoad):
    router = make_router("slo", len(states), MODEL)
    for number, state in enumerate(states):
        router.report(number, state)
    return router


def test_the_replica_with_most_budget_left_is_chosen() -> None:
    busy = ReplicaLoad(prefill_tokens=900, free_tokens=10_000)
    assert slo_router(busy, IDLE, busy).choose(ask(), 0.0) == 1


def test_a_replica_that_cannot_keep_the_slo_is_passed_over() -> None:
    # By time: its prefills take until after the deadline. By pace: decodes take all there is.
    late = ReplicaLoad(prefill_tokens=50_000, free_tokens=10_000)
    slow = ReplicaLoad(decode_rate=9_000.0, tightest_tpot_s=0.05, free_tokens=10_000)
    full = ReplicaLoad(free_tokens=599)
    tight = ReplicaLoad(prefill_tokens=1000, free_tokens=600)
    assert slo_router(late, slow, full, tight).choose(ask(), 0.0) == 3


def test_where_none_can_keep_it_the_one_with_least_to_do_serves_it() -> None:
    states = [ReplicaLoad(prefill_tokens=n, free_tokens=10_000) for n in (90_000, 70_000, 80_000)]
    assert slo_router(*states).choose(ask(), 0.0) == 1


def test_a_cached_prefix_is_worth_its_tokens() -> None:
    ahead = ReplicaLoad(prefill_tokens=100, free_tokens=10_000)
    router = slo_router(IDLE, ahead, IDLE)
    assert router.choose(ask(cached_tokens={1: 400}), 0.0) == 1
    router = slo_router(IDLE, ahead, IDLE)
    assert router.choose(ask(cached_tokens={1: 50}), 0.0) == 0


def test_what_was_placed_counts_until_the_next_report() -> None:
    router = slo_router(IDLE, IDLE, IDLE)
    assert [router.choose(ask(), 0.0) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    router.report(2, ReplicaLoad(free_tokens=10_000, prefill_tokens=5000))
    assert router.choose(ask(), 0.0) == 0


def test_a_request_without_promises_finds_a_place() -> None:
    carefree = ask(deadline=math.inf, tpot_s=math.inf)
    assert slo_router(IDLE, IDLE).choose(carefree, 1e6) == 0


def test_least_loaded_counts_sequences() -> None:
    router = make_router("least-loaded", 3, MODEL)
    for number, count in enumerate([4, 2, 3]):
        router.report(number, ReplicaLoad(num_sequences=count))
    assert [router.choose(ask(), 0.0) for _ in range(3)] == [1, 1, 2]


def test_round_robin_goes_round() -> None:
    router = make_router("round-robin", 3, MODEL)
    assert [router.choose(ask(), 0.0) for _ in range(4)] == [0, 1, 2, 0]


def test_a_request_moves_on_only_to_where_its_slo_can_be_kept() -> None:
    late = ReplicaLoad(prefill_tokens=50_000, free_tokens=10_000)
    busy = ReplicaLoad(prefill_tokens=900, free_tokens=10_000)
    router = slo_router(IDLE, late, busy)
    assert router.choose_better(ask(), 0.0, {0}) == 2
    assert router.choose_better(ask(), 0.0, {0, 2}) is None
    # What was moved there counts at once.
    assert router.choose_better(ask(prompt=2000), 0.0, {0}) is None


@pytest.mark.parametrize("name", ["least-loaded", "round-robin"])
def test_routers_that_do_not_weigh_move_nobody_on(name: str) -> None:
    assert make_router(name, 4, MODEL).choose_better(ask(), 0.0, {0}) is None


@pytest.mark.parametrize("name", list(ROUTERS))
def test_replicas_that_are_not_there_get_nothing(name: str) -> None:
    router = make_router(name, 5, MODEL)
    assert {router.choose(ask(), 0.0, {0, 2, 4}) for _ in range(6)} <= {1, 3}
    assert {router.choose(ask(), 0.0, {0, 1, 2, 4}) for _ in range(3)} == {3}
    # Nor where nobody can keep the SLO.
    assert router.choose(ask(prompt=10**7), 0.0, {0, 1, 3, 4}) == 2


def test_the_settings_name_all_routers() -> None:
    assert set(process_config.ROUTERS) == set(ROUTERS)


def test_an_unknown_router_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown router 'magic'; known: slo, least-loaded"):
        make_router("magic", 2, MODEL)
