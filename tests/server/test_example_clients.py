"""The programs of `examples/` that put work on a server keep what they say, on the embedded model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import openai
import pytest
from example_scripts import load_example
from live_server import ENGINE_SETTINGS, RunningServer, post, run_server
from waiting import PATIENCE_S

from minserve import AsyncEngine
from minserve.server_config import ServerConfig

SETTINGS: dict[str, Any] = {**ENGINE_SETTINGS, "dtype": "auto", "num_blocks": 64, "block_size": 32}


@pytest.fixture(scope="module")
def smollm2() -> Iterator[RunningServer]:
    engine = AsyncEngine("smollm2", **SETTINGS)
    with closing(run_server(engine, ServerConfig(served_model_name="smollm2"))) as running:
        yield next(running)


@pytest.fixture
def customer(smollm2: RunningServer) -> Iterator[openai.OpenAI]:
    with smollm2.client(timeout=PATIENCE_S) as client:
        yield client
    smollm2.wait_until_free()


def counted(server: RunningServer, name: str) -> dict[str, float]:
    """A metric by its labels."""
    _, _, text = post(server, "/metrics", None, method="GET")
    found = re.findall(rf"^minserve:{name}{{(.*)}} (\S+)$", text.decode(), re.MULTILINE)
    return {labels: float(number) for labels, number in found}


def test_the_agent_calls_its_tools_within_one_task(
    customer: openai.OpenAI, smollm2: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = load_example("agent")
    # A deadline that the busiest machine keeps.
    answer = agent.run(customer, agent.QUESTION, finish_ms=1e6)
    assert answer

    printed = capsys.readouterr().out
    calls = re.findall(r"^  (\w+)\((.*)\) = (.*)$", printed, re.MULTILINE)
    assert calls
    for name, arguments, result in calls:
        city = json.loads(arguments)["city"]
        assert city in agent.DEGREES
        assert name in agent.TOOLS
        assert city in result
    tasks = re.findall(r"'call': (\d+), 'calls': (\d+).*'given_up': False", printed)
    assert tasks == [("1", "2"), ("2", "2")]
    assert counted(smollm2, "tasks_total")['outcome="attained"'] == 1


def test_what_is_extracted_fits_the_schema(customer: openai.OpenAI) -> None:
    extraction = load_example("extraction")
    for text in extraction.TEXTS:
        review = extraction.extract(customer, text)
        assert extraction.Review.model_validate(review.model_dump(), strict=True) == review
        assert review.product


def test_the_mixed_load_counts_every_request_that_it_sent(
    smollm2: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_example("mixed_load")
    short = {kind: (slo, 8, pause / 5) for kind, (slo, _, pause) in load.KINDS.items()}
    monkeypatch.setattr(load, "KINDS", short)
    ended = counted(smollm2, "request_success_total")
    judged = counted(smollm2, "slo_requests_total")

    async def run() -> dict[str, Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{smollm2.url}/v1", api_key="none", timeout=PATIENCE_S
        ) as client:
            return await load.run(client, 2.0)

    outcomes = asyncio.run(run())
    sent = {kind: sum(counts.values()) for kind, counts in outcomes.items()}
    assert set(sent) == {"chat", "report", "background"}
    assert min(sent.values()) >= 1

    def more(name: str, before: dict[str, float]) -> float:
        return sum(counted(smollm2, name).values()) - sum(before.values())

    assert more("request_success_total", ended) == sum(sent.values())
    assert more("slo_requests_total", judged) == sent["chat"] + sent["report"]
    assert set(outcomes["background"]) == {"answered"}
    assert set(outcomes["chat"]) <= {"kept", "late"}
