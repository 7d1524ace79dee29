"""Where a policy fails, a safe one plans: nobody ends, and nobody's tokens change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from speculating import DEVICE
from waiting import PATIENCE_S

from minserve import SLO, AsyncEngine, Engine, SamplingParams
from minserve.engine import async_engine, guarded_planning
from minserve.engine.guarded_planning import LOG_EVERY_S, GuardedPlanning
from minserve.engine.stats import EngineStats
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.policies.registry import POLICIES, make_safe_planner
from minserve.planner.predict.perf_model import PerfModel

SETTINGS = {"dtype": "float32", "threads": 1, "token_budget": 16, "max_num_seqs": 8, "num_blocks": 60,
            "block_size": 8}  # fmt: skip
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(5, 45)), [8, 9]]
GENEROUS = SLO(ttft=1000.0, tpot=100.0)


def engine_of(model: Path, **settings: Any) -> Engine:
    engine = Engine(str(model), **SETTINGS, **settings)
    engine._core.planner.model = PerfModel(DEVICE)
    engine._core.plans_ahead = False
    return engine


def tokens(engine: Engine, slo: SLO | None = None) -> list[list[int]]:
    params = [replace(PARAMS, max_tokens=6 + i) for i in range(len(PROMPTS))]
    outputs = engine.generate(PROMPTS, params, slo=slo)
    engine._core.check_integrity()
    return [one.outputs[0].token_ids for one in outputs]


def fail(*_: object) -> IterationPlan:
    raise RuntimeError("planner bug")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_errors_of_a_policy_change_nobodys_tokens(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, policy: str, ahead: bool
) -> None:
    engine = engine_of(tiny_llama_dir, policy=policy)
    slo = GENEROUS if policy in ("dp", "edf") else None
    expected = tokens(engine, slo)
    core = engine._core
    core.plans_ahead = ahead
    plan, num = core.planner._plan, iter(range(1000))

    def sometimes(view: PlannerView, now: float) -> IterationPlan:
        return fail() if next(num) % 3 == 1 else plan(view, now)

    monkeypatch.setattr(core.planner, "_plan", sometimes)
    assert tokens(engine, slo) == expected
    assert core.stats.planner_fallbacks["error"] > 1
    assert core.snapshot().planner_fallbacks == core.stats.planner_fallbacks


def test_prompts_that_must_not_be_split_run_whole_under_the_safe_policy_too(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_llama_dir, policy="fcfs", chunked_prefill=False, prefix_caching=False)
    expected = tokens(engine)
    sizes, launch = set(), engine._core.runner.launch

    def launching(batch: list) -> Any:
        sizes.update(item.num_tokens for item in batch)
        return launch(batch)

    monkeypatch.setattr(engine._core.runner, "launch", launching)
    monkeypatch.setattr(engine._core.planner, "plan", fail)
    assert tokens(engine) == expected
    assert sizes == {1, *map(len, PROMPTS)}


def start_twice(plan: IterationPlan) -> None:
    plan.start += plan.start


def run_nothing(plan: IterationPlan) -> None:
    plan.num_scheduled_tokens.update(dict.fromkeys(plan.num_scheduled_tokens, 0))


def run_a_ghost(plan: IterationPlan) -> None:
    plan.num_scheduled_tokens["ghost"] = 1


@pytest.mark.parametrize("spoil", [start_twice, run_nothing, run_a_ghost])
def test_a_plan_that_cannot_be_carried_out_ends_nobody(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    engine = engine_of(tiny_llama_dir, policy="dp")
    expected = tokens(engine)
    core = engine._core
    plan = core.planner.plan

    def wrong(view: PlannerView, now: float) -> IterationPlan:
        made = plan(view, now)
        spoil(made)
        return made

    monkeypatch.setattr(core.planner, "plan", wrong)
    assert tokens(engine) == expected
    assert core.stats.planner_fallbacks["invalid"] > 0


@pytest.mark.parametrize("news", ["observe", "finished", "verified", "started", "discarded"])
def test_a_policy_that_takes_no_news_costs_no_tokens(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, news: str
) -> None:
    engine = engine_of(tiny_llama_dir, policy="dp", speculator="ngram")
    expected = tokens(engine)
    monkeypatch.setattr(engine._core.planner, news, fail)
    assert tokens(engine) == expected


# -- how long it rests -------------------------------------------------------------------


class Scripted(Planner):
    """Fails where the script says so."""

    name = "scripted"

    def __init__(self, script: Iterator[bool]) -> None:
        super().__init__()
        self.script = script

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        return fail() if next(self.script) else IterationPlan(best_effort_s=1.0)


def played(tiny: Engine, script: list[bool], num: int, apart_s: float = 1.0) -> tuple[str, Any]:
    """Return who made each plan (p: the policy, s: the safe one), and the counts."""
    counts, view = EngineStats().planner_fallbacks, tiny._core.view()
    planning = GuardedPlanning(Scripted(iter(script)), make_safe_planner(), counts)
    made = ""
    for i in range(num):
        plan = planning.plan(view, apart_s * i)
        planning.started(plan)
        made += "p" if plan.best_effort_s else "s"
    return made, counts


def test_a_policy_that_fails_again_and_again_is_asked_less_and_less(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(tiny_llama_dir)
    # One failure costs one iteration, and so does the next one behind a plan that went well.
    made, counts = played(engine, [True, False, True, False, False], 5)
    assert made == "spspp"
    assert counts == {"error": 2, "hang": 0, "invalid": 0, "rest": 0}
    # Failures in a row: asked at once, then after 1, 3, 7 iterations more.
    made, counts = played(engine, [True] * 4 + [False] * 2, 1 + 2 + 4 + 8 + 2)
    assert made == "s" * 15 + "pp"
    assert counts == {"error": 4, "hang": 0, "invalid": 0, "rest": 11}
    assert "4 times in a row" not in caplog.text
    caplog.clear()
    played(engine, [True] * 4, 15, apart_s=LOG_EVERY_S)
    assert "4 times in a row now; sarathi plans 8 iterations in its place" in caplog.text
    assert "planner bug" in caplog.text


# -- a plan that is never ready ----------------------------------------------------------


def test_a_policy_that_hangs_is_interrupted(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_planning, "LONGEST_PLAN_S", 0.1)
    monkeypatch.setattr(async_engine, "WATCH_S", 0.05)

    async def go() -> None:
        engine = AsyncEngine(str(tiny_llama_dir), policy="dp", **SETTINGS)
        core = engine._core
        core.planner.model = PerfModel(DEVICE)
        await engine.start()

        async def ask() -> list[int]:
            return [
                t async for delta in engine.generate([5, 6, 7], PARAMS) for t in delta.token_ids
            ]

        expected = await ask()
        plan, num = core.planner.plan, iter(range(1000))

        def hanging(view: PlannerView, now: float) -> IterationPlan:
            while next(num) == 1 or next(num) > 5:
                for _ in iter(int, 1):
                    pass
            return plan(view, now)

        monkeypatch.setattr(core.planner, "plan", hanging)
        assert await ask() == expected
        monkeypatch.setattr(core.planner, "plan", plan)
        assert engine.stats().planner_fallbacks["hang"] > 0
        assert await ask() == expected
        await engine.stop()

    asyncio.run(asyncio.wait_for(go(), PATIENCE_S))
