"""The speed of an idle server: the fit's arithmetic, and lone requests to a real server."""

from __future__ import annotations

import asyncio
from itertools import count
from types import SimpleNamespace

import pytest
from scripted_server import scripted_server

from minserve.errors import WorkloadError
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.slo.objectives import SLO, DecodeStage, Targets
from minserve.workload import client
from minserve.workload.conversation import Turn
from minserve.workload.endpoint import Endpoint, find_endpoint
from minserve.workload.turn_targets import targets_of, typical_targets
from minserve.workload.zero_load import OUTPUT_TOKENS, ZeroLoad, ZeroLoadSample, fit, measure_speed


def groups(*points: tuple[int, float]) -> list[list[ZeroLoadSample]]:
    return [[ZeroLoadSample(tokens, ttft_s, 0.02)] for tokens, ttft_s in points]


def test_prefill_is_a_line_through_the_medians() -> None:
    noisy = [
        ZeroLoadSample(100, 0.2, 0.02),
        ZeroLoadSample(100, 0.2, 0.02),
        ZeroLoadSample(100, 9.0, 5.0),
    ]
    speed = fit([noisy, *groups((300, 0.4), (500, 0.6))])
    assert speed.base_s == pytest.approx(0.1)
    assert speed.per_token_s == pytest.approx(0.001)
    assert speed.zero_load_prefill_s(200) == pytest.approx(0.3)
    assert speed.zero_load_decode_s(1000) == 0.02


@pytest.mark.parametrize(
    ("points", "base", "slope"),
    [
        (((100, 0.3), (200, 0.1)), 0.2, 0.0),
        (((100, 0.1), (200, 0.3)), 0.0, 0.07 / 0.05 / 1000),
        (((100, 0.1),), 0.1, 0.0),
    ],
)
def test_no_coefficient_is_negative(
    points: tuple[tuple[int, float], ...], base: float, slope: float
) -> None:
    speed = fit(groups(*points))
    assert (speed.base_s, speed.per_token_s) == (pytest.approx(base), pytest.approx(slope))


def test_lone_requests_are_timed_one_after_another_with_prompts_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A clock that goes on whenever it is read: when a request is sent, and when a token comes.
    reads = count()
    clock = SimpleNamespace(perf_counter=lambda: 0.002 * next(reads))
    monkeypatch.setattr(client, "time", clock)
    told = []
    with scripted_server(max_model_len=600) as server:
        endpoint = asyncio.run(find_endpoint(server.url))
        speed = asyncio.run(measure_speed(endpoint, on_progress=lambda *done: told.append(done)))
        prompts = [body["prompt"] for body in server.bodies]
        assert server.most_open == 1
    assert len({prompt[:20] for prompt in prompts}) == len(prompts) == 7
    assert max(map(len, prompts)) <= 4 * 600 - OUTPUT_TOKENS
    assert (speed.base_s, speed.decode_s) == (pytest.approx(0.002), pytest.approx(0.002))
    assert speed.per_token_s == pytest.approx(0.0, abs=1e-9)
    assert speed.characters_per_token == pytest.approx(4, rel=0.1)
    assert told[-1] == (7, 7)


def test_a_server_that_fails_a_lone_request_has_no_speed() -> None:
    with scripted_server() as server:
        url = server.url
    with pytest.raises(WorkloadError, match="cannot be measured"):
        asyncio.run(measure_speed(Endpoint(url, "scripted")))


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("127.0.0.1:9", "no server answers at http://127.0.0.1:9"),
        ("ftp://x", "not the address"),
        ("http://", "not the address"),
        ("http://x:99999", "not the address"),
    ],
)
def test_a_dead_or_senseless_address_is_told(url: str, word: str) -> None:
    with pytest.raises(WorkloadError, match=word):
        asyncio.run(find_endpoint(url))


def test_an_address_may_end_in_v1() -> None:
    with scripted_server() as server:
        endpoint = asyncio.run(find_endpoint(f"{server.url}/v1/"))
    assert (endpoint.url, endpoint.model) == (server.url, "scripted")


@pytest.mark.parametrize(
    "speed", [ZeroLoad(0.02, 0.001, 0.03), PerfModel([Piece(0.001, base=0.02)])]
)
def test_slowdowns_become_seconds_by_the_servers_speed(speed: ZeroLoad | PerfModel) -> None:
    turn = Turn(slo=SLO(ttft_slowdown=3, tpot_slowdown=2), prompt_tokens=100, output_tokens=5)
    targets = targets_of(turn, speed)
    assert targets.ttft_s == pytest.approx(0.36)
    assert targets.stages[0].tpot_s == pytest.approx(2 * speed.zero_load_decode_s(100))


def test_a_stage_with_a_count_of_its_own_keeps_it() -> None:
    slo = SLO(stages=(DecodeStage(tpot=0.1, tokens=7), DecodeStage(tpot=0.2)))
    turn = Turn(slo=slo, prompt_tokens=10, output_tokens=20, thinking_tokens=3)
    assert targets_of(turn, ZeroLoad(0, 0, 0)).stages[0].tokens == 7


def test_typical_targets_are_the_median_ones_of_each_class() -> None:
    several = [("a", Targets(ttft_s=x)) for x in (3.0, 1.0, 2.0)]
    found = typical_targets([*several, ("b", Targets(ttft_s=9.0))])
    assert {name: one.ttft_s for name, one in found.items()} == {"a": 2.0, "b": 9.0}
