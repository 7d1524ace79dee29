"""The queue of one request: order, what is there at once, and its end."""

from __future__ import annotations

import asyncio

from waiting import PATIENCE_S

from minserve.engine.delta_queue import DeltaQueue
from minserve.outputs import OutputDelta
from minserve.request import FinishReason


def delta(number: int, *, ends: bool = False, index: int = 0) -> OutputDelta:
    reason = FinishReason.STOP if ends else None
    return OutputDelta("r", index, token_ids=(number,), finish_reason=reason)


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))


def test_a_reader_gets_all_in_order_and_ends_with_the_last_output() -> None:
    async def test() -> None:
        queue = DeltaQueue(2)
        reading = asyncio.create_task(_all(queue))
        await asyncio.sleep(0)
        for one in (delta(1), delta(2, ends=True), delta(3, index=1)):
            queue.put(one)
            await asyncio.sleep(0)
        assert not reading.done()
        queue.put(delta(4, ends=True, index=1))
        assert [one.token_ids for one in await reading] == [(1,), (2,), (3,), (4,)]
        assert await _all(queue) == []

    run(test())


def test_what_waits_is_taken_at_once_and_ends_count() -> None:
    async def test() -> None:
        queue = DeltaQueue(1)
        for number in range(5):
            queue.put(delta(number, ends=number == 4))
        reader = queue.__aiter__()
        first = await anext(reader)
        taken = queue.waiting(2)
        taken += queue.waiting(10)
        assert [one.token_ids for one in (first, *taken)] == [(i,) for i in range(5)]
        assert queue.waiting(10) == []
        # The end is among what was taken: nothing more is waited for.
        assert [one async for one in reader] == []

    run(test())


def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    async def test() -> None:
        queue = DeltaQueue(1)
        reading = asyncio.create_task(_all(queue))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        queue.put(delta(1))
        queue.put(delta(2, ends=True))
        assert [one.token_ids for one in await _all(queue)] == [(1,), (2,)]

    run(test())


async def _all(queue: DeltaQueue) -> list[OutputDelta]:
    return [one async for one in queue]
