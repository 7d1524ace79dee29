"""The process that reads large bodies gives what reading here gives, and its end harms one request."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
from multidict import CIMultiDict
from waiting import PATIENCE_S

from minserve.errors import InvalidRequestError, InvalidSLOError, RequestTooLongError
from minserve.server.errors import HttpError
from minserve.server.reading import reader_process
from minserve.server.reading.reader import Facts, Reader
from minserve.server.reading.reader_process import ReaderProcess


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """A loop on which a process may outlive a test."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared(facts: Facts, runner: asyncio.Runner) -> Iterator[ReaderProcess]:
    """A process for tests that do it no harm."""
    process = ReaderProcess(facts, 5)
    yield process
    runner.run(process.close())


@asynccontextmanager
async def running(facts: Facts) -> AsyncIterator[ReaderProcess]:
    process = ReaderProcess(facts, 5)
    try:
        yield process
    finally:
        await process.close()


def arguments(endpoint: str, headers: dict[str, str] | None = None, **body: Any) -> tuple[Any, ...]:
    return json.dumps(body).encode(), 1.5, endpoint, CIMultiDict(headers or {})


def chat(content: str, **more: Any) -> tuple[Any, ...]:
    return arguments("chat", messages=[{"role": "user", "content": content}], **more)


CALLS = [
    chat("Hello " * 1000, max_tokens=5, seed=7, stop=["x"]),
    arguments("completions", prompt=["a b", "c d"], echo=True, n=2),
    arguments("completions", prompt=[[1, 2, 3], [4]], slo={"ttft_ms": 100}),
    arguments("completions", {"X-SLO-TTFT-ms": "5"}, prompt="a", slo={"tpot_ms": 100}),
    arguments("completions", {"x-slo-ttft-ms": "-5"}, prompt="a"),
    chat("Hello", slo="no such class"),
    chat("Hello", temperature=-1),
    chat("Hello", model="other"),
    chat("word " * 20000),
    arguments("completions", prompt="a", n=65),
]


def outcome(call: Any) -> Any:
    try:
        return call()
    except (InvalidRequestError, HttpError) as error:
        return type(error), str(error), vars(error)


def test_reading_elsewhere_gives_the_same_as_here(
    facts: Facts, shared: ReaderProcess, runner: asyncio.Runner
) -> None:
    async def read_all() -> list[Any]:
        jobs = [shared.call("generation", args, 1) for args in CALLS]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        return [
            (type(one), str(one), vars(one)) if isinstance(one, Exception) else one
            for one in results
        ]

    here = Reader(facts)
    expected = [outcome(lambda args=args: here.generation(*args)) for args in CALLS]
    assert runner.run(read_all()) == expected
    kinds = [one[0] for one in expected if isinstance(one, tuple)]
    assert set(kinds) == {InvalidSLOError, InvalidRequestError, HttpError, RequestTooLongError}


def test_ids_and_text_are_told_as_here(
    facts: Facts, shared: ReaderProcess, runner: asyncio.Runner
) -> None:
    bodies = [
        ("tokenized", json.dumps({"prompt": "Hello " * 3000}).encode()),
        ("tokenized", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()),
        ("detokenized", json.dumps({"tokens": list(range(1000))}).encode()),
    ]

    async def read_all() -> list[bytes]:
        return [await shared.call(method, (raw,), 1) for method, raw in bodies]

    here = Reader(facts)
    assert runner.run(read_all()) == [getattr(here, method)(raw) for method, raw in bodies]


def test_the_process_does_without_torch_and_lets_others_go_first(
    shared: ReaderProcess, runner: asyncio.Runner
) -> None:
    runner.run(shared.call("generation", chat("Hello"), 1))
    child = _child_of(shared)
    niceness, files = child.nice(), [one.path for one in child.memory_maps()]
    assert niceness == min(psutil.Process().nice() + 5, 19)
    assert not any("libtorch" in path for path in files)


def test_the_process_ends_with_its_parent(shared: ReaderProcess, runner: asyncio.Runner) -> None:
    async def end() -> psutil.Process:
        await shared.call("generation", chat("Hello"), 1)
        child = _child_of(shared)
        # As if this process had ended: the system closes its end of the pipe.
        assert shared._process is not None
        assert shared._process.stdin is not None
        shared._process.stdin.close()
        await shared._process.wait()
        return child

    assert not runner.run(end()).is_running()


def test_the_shortest_body_is_read_first(facts: Facts) -> None:
    async def read_all() -> list[str]:
        done: list[str] = []

        async def read(name: str, size: int) -> None:
            await process.call("generation", chat("Hello"), size)
            done.append(name)

        async with running(facts) as process:
            # The process is still starting, so all wait.
            await asyncio.gather(read("long", 9), read("short", 1), read("middle", 5))
        return done

    assert asyncio.run(read_all()) == ["short", "middle", "long"]


def test_a_body_that_kills_the_process_or_takes_too_long_fails_alone(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read_all() -> list[Any]:
        async with running(facts) as process:
            await process.call("generation", chat("Hello"), 1)
            child = _child_of(process)
            child.send_signal(signal.SIGSTOP)
            dying = asyncio.create_task(process.call("generation", chat("Hello"), 1))
            following = asyncio.create_task(process.call("generation", chat("Hi"), 2))
            await asyncio.sleep(0)
            child.kill()
            found = await asyncio.gather(dying, following, return_exceptions=True)

            child = _child_of(process)
            child.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(reader_process, "PATIENCE_S", 0.1)
            hanging = process.call("generation", chat("Hello"), 1)
            found += await asyncio.gather(hanging, return_exceptions=True)
            monkeypatch.undo()
            return [*found, await process.call("generation", chat("Hi"), 1)]

    dead, after_death, slow, after_slow = asyncio.run(read_all())
    for error, status in ((dead, 500), (slow, 503)):
        assert isinstance(error, HttpError)
        assert error.status == status
    assert after_death.prompts
    assert after_slow.prompts


def test_a_client_that_leaves_costs_nothing_more(facts: Facts) -> None:
    async def read_all() -> Any:
        async with running(facts) as process:
            left = asyncio.create_task(process.call("generation", chat("Hello"), 1))
            await asyncio.sleep(0)
            left.cancel()
            return await process.call("generation", chat("Hi"), 2)

    assert asyncio.run(read_all()).prompts


def _child_of(process: ReaderProcess) -> psutil.Process:
    assert process._process is not None
    return psutil.Process(process._process.pid)


def test_a_process_that_cannot_be_started_at_first_is_started_later(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failures = asyncio.create_subprocess_exec, [OSError(24, "Too many open files")] * 2

    async def failing_at_first(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        if failures:
            raise failures.pop()
        return await start(*args, **options)

    async def read_twice() -> list[Any]:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", failing_at_first)
        async with running(facts) as process:
            process.start()
            outcomes: list[Any] = []
            for _ in range(2):
                job = process.call("generation", chat("Hello"), 1)
                outcomes += await asyncio.gather(
                    asyncio.wait_for(job, PATIENCE_S), return_exceptions=True
                )
            return outcomes

    refused, read = asyncio.run(read_twice())
    assert isinstance(refused, HttpError)
    assert refused.status == 503
    assert read == Reader(facts).generation(*chat("Hello"))
