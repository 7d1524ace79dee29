"""What goes wrong in an iteration ends whom it concerns, and nothing that happened goes untold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from speculating import DEVICE
from waiting import PATIENCE_S

from minserve import SLO, AsyncEngine, Engine, SamplingParams
from minserve.engine.core import EngineCore
from minserve.engine.relay import RelayEngine
from minserve.errors import (
    DeviceLostError,
    GenerationError,
    InvalidPlanError,
    SLOUnattainableError,
)
from minserve.planner.plan import IterationPlan, PlannerView, Refusal
from minserve.planner.predict.perf_model import PerfModel

SETTINGS = {"dtype": "float32", "threads": 1, "token_budget": 64, "max_num_seqs": 8, "num_blocks": 60,
            "block_size": 8, "policy": "dp"}  # fmt: skip
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
REFUSING = SLO(ttft=1000.0, on_unattainable="reject")
Change = Callable[[IterationPlan, PlannerView], IterationPlan]


@pytest.fixture
def settings(tiny_llama_dir: Path) -> dict[str, Any]:
    return {"model": str(tiny_llama_dir), **SETTINGS}


def unguarded(engine: Any) -> Any:
    """An engine without a safe policy to fall back to."""
    engine._core.planning._safe = None
    return prepared(engine)


def prepared(engine: Any) -> Any:
    engine._core.planner.model = PerfModel(DEVICE)
    engine._core.plans_ahead = False
    return engine


def add(engine: Any, prompt: list[int], n: int = 1, slo: SLO | None = None) -> str:
    submission = engine._prepare(prompt, replace(PARAMS, n=n), slo=slo)
    engine._enqueue(submission)
    return submission.request.request_id


def change_plans(core: EngineCore, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = core.planner.plan

    def changed(view: PlannerView, now: float) -> IterationPlan:
        return change(plan(view, now), view)

    monkeypatch.setattr(core.planner, "plan", changed)


def drain(engine: Any) -> dict[str, list]:
    told: dict[str, list] = {}
    while engine._core.has_work:
        for delta in engine._core.step():
            told.setdefault(delta.request_id, []).append(delta)
    assert engine._core.take_untold() == []
    engine._core.check_integrity()
    return told


def refuse_half(request_id: str) -> Change:
    """Refuse one output of a request and start another: what brought down every stream once."""

    def change(plan: IterationPlan, _: PlannerView) -> IterationPlan:
        if f"{request_id}/0" in plan.start:
            plan.reject[f"{request_id}/1"] = Refusal("compute", 1.0)
        return plan

    return change


def test_a_plan_that_contradicts_itself_about_a_request_ends_that_one_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = unguarded(Engine(**settings))
    (alone,) = engine.generate([[5, 6, 7]], PARAMS)
    good, bad = add(engine, [5, 6, 7]), add(engine, [8, 9], n=4, slo=REFUSING)
    change_plans(engine._core, refuse_half(bad), monkeypatch)
    told = drain(engine)
    assert [token for d in told[good] for token in d.token_ids] == alone.outputs[0].token_ids
    assert [d.index for d in told[bad]] == [0, 1, 2, 3]
    assert all(isinstance(d.error, InvalidPlanError) for d in told[bad])


def test_sequences_that_nobody_knows_are_passed_over(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = unguarded(Engine(**settings))
    (alone,) = engine.generate([[5, 6, 7]], PARAMS)

    def change(plan: IterationPlan, _: PlannerView) -> IterationPlan:
        plan.num_scheduled_tokens["ghost"] = 1
        plan.declined.append("ghost")
        return plan

    change_plans(engine._core, change, monkeypatch)
    engine._core.plans_ahead = True
    good = add(engine, [5, 6, 7])
    told = drain(engine)
    assert [token for d in told[good] for token in d.token_ids] == alone.outputs[0].token_ids
    assert "names ghost" in caplog.text


def test_who_is_promised_more_blocks_than_there_are_ends_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = prepared(Engine(**settings))
    (alone,) = engine.generate([[5, 6, 7]], PARAMS)
    good, bad = add(engine, [5, 6, 7]), add(engine, list(range(5, 60)), n=2)
    core = engine._core
    grow = core.pool.grow

    def tight(seq: Any, num_tokens: int) -> None:
        grow(seq, num_tokens if seq.seq_id != f"{bad}/0" else 10_000)

    monkeypatch.setattr(core.pool, "grow", tight)
    told = drain(engine)
    assert [token for d in told[good] for token in d.token_ids] == alone.outputs[0].token_ids
    assert [type(d.error) for d in told[bad]] == [InvalidPlanError] * 2


def test_who_gets_no_blocks_once_waits_for_the_safe_policy_to_run_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = prepared(Engine(**settings))
    alone = engine.generate([[5, 6, 7], list(range(5, 60))], PARAMS)
    good, unlucky = add(engine, [5, 6, 7]), add(engine, list(range(5, 60)))
    core = engine._core
    grow = core.pool.grow

    def tight(seq: Any, num_tokens: int) -> None:
        fails = seq.seq_id == unlucky and seq.num_preemptions == 0
        grow(seq, 10_000 if fails else num_tokens)

    monkeypatch.setattr(core.pool, "grow", tight)
    told = drain(engine)
    for request_id, expected in zip((good, unlucky), alone, strict=True):
        got = [token for d in told[request_id] for token in d.token_ids]
        assert got == expected.outputs[0].token_ids
    assert core.stats.planner_fallbacks["rest"] == 1


@pytest.mark.parametrize("end", ["stops by itself", "is aborted"])
def test_an_output_whose_last_words_fail_frees_its_blocks(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    engine = prepared(Engine(**settings))
    (alone,) = engine.generate([[5, 6, 7]], PARAMS)
    good, bad = add(engine, [5, 6, 7]), add(engine, [8, 9])
    core = engine._core

    def broken() -> str:
        raise RuntimeError("half a letter")

    monkeypatch.setattr(core.table.outputs[bad].detokenizer, "flush", broken)
    deltas = core.step()
    if end == "is aborted":
        deltas += core.abort(bad)
    while core.has_work:
        deltas += core.step()
    core.check_integrity()
    told = [token for d in deltas if d.request_id == good for token in d.token_ids]
    assert told == alone.outputs[0].token_ids
    (error,) = [d.error for d in deltas if d.request_id == bad and d.finish_reason is not None]
    assert isinstance(error, GenerationError)
    assert "half a letter" in str(error)


def test_an_output_whose_text_cannot_be_made_ends_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = prepared(Engine(**settings))
    (alone,) = engine.generate([[5, 6, 7]], PARAMS)
    good, bad = add(engine, [5, 6, 7]), add(engine, [8, 9])

    def broken(*_: Any) -> Any:
        raise RuntimeError("no such letter")

    monkeypatch.setattr(engine._core.table.outputs[bad].detokenizer, "add", broken)
    told = drain(engine)
    assert [token for d in told[good] for token in d.token_ids] == alone.outputs[0].token_ids
    (end,) = told[bad]
    assert isinstance(end.error, GenerationError)
    assert "no such letter" in str(end.error)


# -- what was brought before a failure ---------------------------------------------------


def refuse_then_fail(core: EngineCore, bad: str, error: Exception, patch: Any) -> None:
    """Refuse a request in the next iteration, and let the rest of that fail."""

    def change(plan: IterationPlan, view: PlannerView) -> IterationPlan:
        refusal = Refusal("compute", 1.0)
        ids = [seq.seq_id for seq in view.waiting if seq.request.request_id == bad]
        return replace(
            plan.only({s.seq_id for s in view.running}), reject=dict.fromkeys(ids, refusal)
        )

    def fail(_: Any) -> None:
        raise error

    change_plans(core, change, patch)
    patch.setattr(core, "_start", fail)


def test_a_refusal_is_told_although_the_rest_of_the_iteration_fails(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = prepared(RelayEngine(**settings))
    running = add(engine, [5, 6, 7])
    engine.step()
    bad = add(engine, [8, 9], n=3, slo=REFUSING)
    refuse_then_fail(engine._core, bad, RuntimeError("a bug"), monkeypatch)
    deltas = engine.step().deltas
    errors = [(d.request_id, d.index, type(d.error)) for d in deltas]
    assert errors == [
        *((bad, index, SLOUnattainableError) for index in range(3)),
        (running, 0, GenerationError),
    ]
    assert not engine.has_work
    assert engine.step().declined == []


def test_a_blocking_engine_tells_a_refusal_although_the_iteration_fails(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = prepared(Engine(**settings))
    running = engine.stream([5, 6, 7], PARAMS)
    next(running)
    refused = engine.stream([8, 9], replace(PARAMS, n=2), slo=REFUSING)
    with monkeypatch.context() as patch:
        # Its id is known once it is asked for, in the iteration that fails.
        enqueue = engine._enqueue

        def enqueuing(submission: Any) -> None:
            enqueue(submission)
            error = RuntimeError("a bug")
            refuse_then_fail(engine._core, submission.request.request_id, error, patch)

        patch.setattr(engine, "_enqueue", enqueuing)
        with pytest.raises(RuntimeError, match="a bug"):
            next(refused)
    assert sum(len(delta.token_ids) for delta in running) == 5
    assert engine._core.take_untold() == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), DeviceLostError("the device is gone")])
def test_no_output_of_a_failing_iteration_stays_unfinished(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def go() -> None:
        engine = AsyncEngine(**settings)
        core = prepared(engine)._core
        await engine.start()
        (running,) = engine.submit([[5, 6, 7]], replace(PARAMS, max_tokens=400))
        news = aiter(running)
        await anext(news)
        prepare = engine._prepare

        def preparing(*args: Any) -> Any:
            submission = prepare(*args)
            refuse_then_fail(core, submission.request.request_id, error, monkeypatch)
            return submission

        monkeypatch.setattr(engine, "_prepare", preparing)
        (refused,) = engine.submit([[8, 9]], replace(PARAMS, n=5), slo=REFUSING)
        ends = [delta async for delta in refused]
        async for delta in news:
            last = delta
        assert isinstance(last.error, GenerationError)
        assert len(ends) == 5
        assert all(
            isinstance(delta.error, (SLOUnattainableError, GenerationError)) for delta in ends
        )
        assert engine.num_unfinished == 0
        assert engine.iteration_s == 0.0
        await engine.stop()

    asyncio.run(asyncio.wait_for(go(), PATIENCE_S))


def test_outputs_that_nobody_works_on_are_no_good_health(settings: dict[str, Any]) -> None:
    async def go() -> None:
        engine = AsyncEngine(**settings)
        prepared(engine)
        await engine.start()
        assert engine.iteration_s == 0.0
        engine._enqueue = lambda _: None
        engine.submit([[5, 6, 7]], PARAMS)
        while (first := engine.iteration_s) == 0.0 or engine.iteration_s <= first:
            await asyncio.sleep(0)
        assert engine.num_unfinished == 1
        await engine.stop()

    asyncio.run(asyncio.wait_for(go(), PATIENCE_S))
