"""The asyncio engine: concurrency, aborts, limits and shutdown on a real tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from minserve import AsyncEngine, Engine, SamplingParams
from minserve.engine.device import transfers
from minserve.errors import EngineStoppedError, GenerationError, InvalidRequestError, QueueFullError
from minserve.request import FinishReason

SETTINGS = {"dtype": "float32", "threads": 1, "num_blocks": 200, "block_size": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=450, ignore_eos=True)


@pytest.fixture
def run(tiny_llama_dir: Path) -> Callable[..., object]:
    """Runs a coroutine function on a started engine and stops it afterwards."""

    @asynccontextmanager
    async def started(**settings: object) -> AsyncIterator[AsyncEngine]:
        engine = AsyncEngine(str(tiny_llama_dir), **SETTINGS | settings)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()
            engine._core.pool.check_integrity([])
            assert engine._core.pool.num_free_blocks == engine._core.pool.num_blocks

    def runner(test: Callable[[AsyncEngine], Coroutine], **settings: object) -> object:
        async def main() -> object:
            async with started(**settings) as engine:
                return await asyncio.wait_for(test(engine), PATIENCE_S)

        return asyncio.run(main())

    return runner


async def collect(engine: AsyncEngine, prompt: object, params: SamplingParams) -> list[int]:
    return [t async for d in engine.generate(prompt, params) for t in d.token_ids]


async def until_idle(engine: AsyncEngine) -> None:
    while engine.num_unfinished:
        await asyncio.sleep(0.005)


def test_concurrent_requests_get_what_they_get_alone(run: Callable, tiny_llama_dir: Path) -> None:
    prompt_list = [[i + 5] * (3 * i + 1) for i in range(8)]
    blocking = Engine(str(tiny_llama_dir), **SETTINGS)
    expected = [blocking.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompt_list]

    async def test(engine: AsyncEngine) -> list[list[int]]:
        return await asyncio.gather(*(collect(engine, p, GREEDY) for p in prompt_list))

    assert run(test) == expected


def test_streams_that_come_and_go_while_two_iterations_overlap(
    run: Callable, tiny_llama_dir: Path
) -> None:
    prompt_list = [[i + 5] * (3 * i + 1) for i in range(8)]
    blocking = Engine(str(tiny_llama_dir), **SETTINGS)
    expected = [blocking.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompt_list]

    async def some(engine: AsyncEngine, prompt: list[int], num: int) -> list[int]:
        stream, tokens = engine.generate(prompt, GREEDY), []
        async for delta in stream:
            tokens += delta.token_ids
            if len(tokens) >= num:
                await stream.aclose()
        return tokens

    async def test(engine: AsyncEngine) -> list[list[int]]:
        core = engine._core
        core.plans_ahead = core.launches_ahead = True
        found = await asyncio.gather(
            *(some(engine, p, 3 + 5 * i) for i, p in enumerate(prompt_list))
        )
        assert engine.stats().plans_ahead["launched"] > 10
        await until_idle(engine)
        handle, *_ = engine.submit([prompt_list[1]], ENDLESS)
        await anext(aiter(handle))
        return found  # the engine is stopped while that one runs

    for tokens, whole in zip(run(test), expected, strict=True):
        assert tokens == whole[: len(tokens)]


def test_leaving_a_stream_aborts_it_and_frees_its_blocks(run: Callable) -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate([7] * 20, ENDLESS)
        await anext(stream)
        assert engine._core.pool.num_free_blocks < 200
        await stream.aclose()
        await until_idle(engine)
        assert engine._core.pool.num_free_blocks == 200

    run(test)


def test_two_hundred_requests_opened_and_dropped_leave_nothing(run: Callable) -> None:
    async def test(engine: AsyncEngine) -> None:
        handles = [engine.submit([[7] * 20], ENDLESS)[0] for _ in range(200)]
        for handle in handles:
            handle.abort()
            handle.abort()
        await until_idle(engine)
        assert len(await collect(engine, [7] * 5, GREEDY)) == 20

    run(test)


def test_the_queue_limit_counts_prompts_times_n(run: Callable) -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequestError, match="9 outputs in one request; at most 8"):
            engine.submit([[5], [6], [7]], SamplingParams(n=3))
        assert engine.num_unfinished == 0
        handles = engine.submit([[5], [6]], SamplingParams(n=4, max_tokens=400, ignore_eos=True))
        with pytest.raises(QueueFullError, match="limit of 8"):
            engine.submit([[5]], GREEDY)
        for handle in handles:
            handle.abort()
        await until_idle(engine)
        engine.submit([[5]], GREEDY)[0].abort()

    run(test, max_queue=8)


def test_submit_is_all_or_none(run: Callable) -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequestError):
            engine.submit([[5], []], GREEDY)
        assert engine.num_unfinished == 0

    run(test)


def test_stop_drains_what_runs(run: Callable) -> None:
    async def test(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, [5], GREEDY))
        await asyncio.sleep(0)
        while not engine.num_unfinished:
            await asyncio.sleep(0)
        await engine.stop(timeout_s=PATIENCE_S)
        assert len(await task) == 20
        assert not engine.is_healthy
        with pytest.raises(EngineStoppedError):
            engine.submit([[5]], GREEDY)

    run(test)


def test_stop_ends_the_rest_with_an_error(run: Callable) -> None:
    async def test(engine: AsyncEngine) -> None:
        (handle,) = engine.submit([[5]], ENDLESS)
        await engine.stop(timeout_s=0.0)
        deltas = [d async for d in handle]
        assert deltas[-1].finish_reason is FinishReason.ERROR
        assert isinstance(deltas[-1].error, EngineStoppedError)

    run(test)


def test_an_iteration_that_fails_ends_its_requests_and_the_engine_serves_on(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: AsyncEngine) -> None:
        start = engine._core._start

        def broken(*_: object) -> None:
            monkeypatch.setattr(engine._core, "_start", start)
            raise RuntimeError("books in disorder")

        monkeypatch.setattr(engine._core, "_start", broken)
        with pytest.raises(GenerationError, match="books in disorder"):
            await collect(engine, [5], GREEDY)
        assert engine.is_healthy
        assert len(await collect(engine, [5], GREEDY)) == 20

    run(test)


def test_a_broken_core_ends_every_request_and_accepts_no_more(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = AsyncEngine(str(tiny_llama_dir), **SETTINGS)
        await engine.start()
        handles = engine.submit([[5], [6]], SamplingParams(n=2, max_tokens=450, ignore_eos=True))

        def broken(*_: object) -> None:
            raise RuntimeError("books in disorder")

        monkeypatch.setattr(engine._core, "step", broken)
        monkeypatch.setattr(engine._core, "abort_all", broken)
        for handle in handles:
            deltas = [d async for d in handle]
            failures = [d for d in deltas if d.finish_reason is FinishReason.ERROR]
            assert len(failures) == 2
            assert "books in disorder" in str(failures[0].error)
        assert not engine.is_healthy
        with pytest.raises(EngineStoppedError):
            engine.submit([[5]], GREEDY)
        await engine.stop()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_an_idle_engine_that_has_lost_a_block_accepts_no_more(tiny_llama_dir: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(str(tiny_llama_dir), **SETTINGS)
        await engine.start()
        await anext(aiter(engine.submit([[5]], GREEDY)[0]))
        engine._core.pool._free.popitem()
        while engine.is_healthy:
            await asyncio.sleep(0.01)
        await engine.stop()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_lost_device_ends_every_request_and_the_engine_accepts_no_more(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: AsyncEngine) -> None:
        def fall_over(*_: object) -> None:
            raise RuntimeError("illegal memory access")

        handles = engine.submit([[5, 6], [7, 8]], ENDLESS)
        monkeypatch.setattr(engine._core.runner, "launch", fall_over)
        monkeypatch.setattr(transfers, "is_lost", lambda _: True)
        for handle in handles:
            last = [delta async for delta in handle][-1]
            assert isinstance(last.error, GenerationError)
            assert "runs nothing any more; restart the process" in str(last.error)
        assert not engine.is_healthy
        with pytest.raises(EngineStoppedError):
            engine.submit([[5, 6]], GREEDY)
        engine._core.abort_all(EngineStoppedError("the test is over"))

    run(test)


def test_priority_runs_first(run: Callable) -> None:
    async def test(engine: AsyncEngine) -> list[str]:
        order: list[str] = []

        async def follow(name: str, priority: int) -> None:
            async for delta in engine.generate([5] * 9, GREEDY, priority=priority):
                if delta.finish_reason:
                    order.append(name)

        await asyncio.gather(*(follow(n, p) for n, p in [("a", 0), ("b", 5), ("c", -5)]))
        return order

    order = run(test, max_num_seqs=1)
    assert order.index("c") < order.index("b")
