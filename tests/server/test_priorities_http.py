"""Who is promised its SLO where not all can be, over real sockets: the more valuable requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import RunningServer, hanging, post
from waiting import wait_until

from minserve.server_config import ServerConfig

PATH = "/v1/completions"
BODY = {"prompt": "The quick brown fox", "temperature": 0, "ignore_eos": True}
PATIENT = {"ttft_ms": 500_000, "on_unattainable": "reject"}
NUM_SLOTS = 2


@pytest.fixture(scope="module", params=["dp", "edf"])
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


def answers(server: RunningServer, asked: list[dict[str, Any]]) -> list[int]:
    """The statuses of requests that the planner sees all at once, each after the ones before it."""

    def ask(body: dict[str, Any]) -> Future[Any]:
        due = server.engine.num_unfinished + body.get("n", 1)
        future = pool.submit(post, server, PATH, {**BODY, **body})
        wait_until(lambda: server.engine.num_unfinished == due or future.done())
        return future

    with ThreadPoolExecutor() as pool, hanging(server) as go_on:
        # It keeps the engine busy while the others come, and no longer.
        first = ask({"max_tokens": 1})
        # Its own iteration has begun, so that nobody else is in the plan of that.
        wait_until(lambda: server.engine._step_began is not None)
        futures = [ask(body) for body in asked]
        go_on.set()
        assert first.result()[0] == 200
        results = [future.result() for future in futures]
    for status, _, raw in results:
        assert status == 200 or json.loads(raw)["error"]["code"] == "slo_unattainable"
    server.wait_until_free()
    return [status for status, _, _ in results]


def test_where_not_all_fit_the_more_valuable_are_promised(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer], policy: str
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(), policy=policy, max_num_seqs=NUM_SLOTS)

    def with_slots(*fields: dict[str, Any]) -> list[bool]:
        """Whether each of several requests gets one of two slots; the last two came last."""
        asked = [{"max_tokens": 8, "slo": PATIENT, **one} for one in fields]
        return [status == 200 for status in answers(server, asked)]

    plain: dict[str, Any] = {}
    last = [False, False, False, True, True]
    assert with_slots(*[plain] * 3, *[{"priority": -1}] * 2) == last
    assert with_slots(*[{"priority": 7}] * 3, *[plain] * 2) == last
    assert with_slots(*[plain] * 3, *[{"slo": {**PATIENT, "value": 3}}] * 2) == last
    # Twice the value is a step of priority; the ends of its range count as 10 steps.
    dear = {"slo": {**PATIENT, "value": 2.5}, "priority": 1}
    assert with_slots(*[plain] * 3, dear, dear) == last
    extreme = {"priority": -(2**63)}
    assert with_slots(*[{"priority": 2**63 - 1}] * 3, extreme, extreme) == last
    # A request of two outputs takes two slots, and its value counts once.
    two = {"n": 2, "priority": -2}
    assert with_slots(plain, two, {"priority": -1}) == [False, True, False]
    if policy == "dp":  # `edf` takes the first of equal value, though it takes the room of two
        assert with_slots(plain, {**two, "priority": -1}, {"priority": -1}) == [True, False, True]
