"""Tasks in both engines of Python: calls are numbered, reported, and end whatever becomes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from minserve import AsyncEngine, Engine, SamplingParams
from minserve.errors import GenerationError, InvalidSLOError, SLOUnattainableError
from minserve.slo.objectives import SLO, OnUnattainable, Task
from minserve.slo.task_table import TaskOutcome

SETTINGS = {"dtype": "float32", "threads": 1, "num_blocks": 200, "block_size": 8}
SHORT = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = list(range(5, 45))


def call(name: str, **more: object) -> SLO:
    fields = {"id": name, "finish": 10_000.0, "calls": 2, **more}
    return SLO(task=Task(**fields))


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(str(tiny_llama_dir), **SETTINGS)


def test_calls_of_a_blocking_engine(engine: Engine) -> None:
    # Two prompts at once are one call; both are told so.
    first, beside = engine.generate([PROMPT, PROMPT[::-1]], SHORT, slo=call("two"))
    assert first.slo.task.call == beside.slo.task.call == 1
    assert engine._core.pool.num_held_blocks > 0
    again = [*PROMPT, *first.outputs[0].token_ids, 7]
    (second,) = engine.generate([again], SHORT, slo=call("two"))
    assert (second.slo.task.call, second.slo.task.calls) == (2, 2)
    assert second.num_cached_tokens >= 40
    assert 0 < second.slo.task.remaining_s < first.slo.task.remaining_s < 10_000
    assert engine.task_outcomes[TaskOutcome.ATTAINED] == 1
    assert engine._core.pool.num_held_blocks == 0
    engine._core.check_integrity()


def test_a_stream_that_is_closed_made_no_call(engine: Engine) -> None:
    stream = engine.stream(PROMPT, SHORT, slo=call("closed"))
    next(stream)
    stream.close()
    (output,) = engine.generate([PROMPT], SHORT, slo=call("closed"))
    assert output.slo.task.call == 1


def test_errors_come_before_anything_runs(engine: Engine) -> None:
    engine.generate([PROMPT], SHORT, slo=call("same"))
    with pytest.raises(InvalidSLOError, match="began with 2 calls"):
        engine.generate([PROMPT], SHORT, slo=call("same", calls=3))
    late = SLO(task=Task(id="late", finish=1e-6, calls=2), on_unattainable=OnUnattainable.REJECT)
    with pytest.raises((SLOUnattainableError, GenerationError)):
        engine.generate([PROMPT], SHORT, slo=late)
    assert not engine._core.has_work


def test_calls_of_an_engine_for_asyncio(tiny_llama_dir: Path) -> None:
    async def calls() -> list[int]:
        engine = AsyncEngine(str(tiny_llama_dir), **SETTINGS)
        await engine.start()
        numbers = []
        for client in ("a", "a", "b"):
            (handle,) = engine.submit([PROMPT], SHORT, slo=call("one"), client=client)
            numbers += [d.slo.task.call async for d in handle if d.slo is not None]
        await engine.stop()
        assert engine.task_outcomes[TaskOutcome.ATTAINED] == 1
        return numbers

    assert asyncio.run(calls()) == [1, 2, 1]
