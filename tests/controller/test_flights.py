"""What a client was told is kept, and is what the next replica is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from waiting import PATIENCE_S

from minserve.controller import messages as m
from minserve.controller.flights import Flight, FlightHandle, ending
from minserve.engine.tasks import Tasks, TaskWatch
from minserve.errors import GenerationError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason, Request
from minserve.sampling_params import SamplingParams

PROMPT = (1, 2, 3, 4)


def flight_of(n: int) -> Flight:
    return Flight.of(
        Request(
            request_id="a",
            prompt_token_ids=PROMPT,
            params=SamplingParams(n=n, max_tokens=20, prompt_logprobs=0),
            seed=3,
            arrival_s=100.0,
        )
    )


def handle_of(
    flight: Flight, prompt: str | None = None, abort: Callable[[str], None] = lambda _: None
) -> FlightHandle:
    return FlightHandle(
        flight, prompt, abort, abort, TaskWatch(Tasks(float, lambda: None), flight.request)
    )


def delta(index: int, *tokens: int, **more: object) -> OutputDelta:
    return OutputDelta("a", index, token_ids=tokens, **more)


def end(index: int, *tokens: int) -> OutputDelta:
    return delta(index, *tokens, finish_reason=FinishReason.LENGTH)


def test_a_request_that_has_not_begun_is_submitted_as_it_came() -> None:
    flight = flight_of(2)
    assert flight.submit(100.5) == m.Submit(
        request=flight.request, age_s=0.5, outputs={0: m.Resumed(), 1: m.Resumed()}
    )


def test_it_is_submitted_with_what_was_delivered_and_how_long_ago() -> None:
    flight = flight_of(2)
    flight.note(delta(0, 10, prompt_logprobs=(None,)), 101.0)
    flight.note(delta(1, 20), 101.5)
    flight.note(delta(0, 11, 12), 102.0)
    flight.note(delta(0, 13), 102.5)
    asked = flight.submit(104.0)
    assert asked.age_s == 4.0
    assert asked.outputs == {
        0: m.Resumed(token_ids=(10, 11, 12, 13), ages_s=(3.0, 2.0, 2.0, 1.5), told_prompt=True),
        1: m.Resumed(token_ids=(20,), ages_s=(2.5,)),
    }
    # It comes out of the wire as it went in, and asking changes nothing.
    assert m.decode(m.encode(asked)) == asked == flight.submit(104.0)


def test_the_prompt_stays_told() -> None:
    flight = flight_of(1)
    flight.note(delta(0, 10, prompt_logprobs=(None,)), 101.0)
    flight.note(delta(0, 11), 102.0)
    assert flight.submit(103.0).outputs[0].told_prompt


def test_outputs_that_have_ended_are_not_submitted() -> None:
    flight = flight_of(3)
    flight.note(end(1, 10), 101.0)
    assert list(flight.submit(102.0).outputs) == [0, 2]
    assert flight.num_open == 2
    flight.note(end(0), 102.0)
    flight.note(end(2), 102.0)
    assert flight.submit(103.0).outputs == {}
    assert flight.num_open == 0


def test_it_has_begun_once_its_client_has_heard_of_any_output() -> None:
    flight = flight_of(2)
    assert not flight.has_begun
    flight.note(delta(1, 10), 101.0)
    assert flight.has_begun
    ended = flight_of(2)
    ended.note(end(1), 101.0)
    assert ended.has_begun


def test_its_tokens_are_those_of_the_prompt_and_the_longest_open_output() -> None:
    flight = flight_of(3)
    assert flight.num_tokens == 4
    flight.note(delta(0, 10), 101.0)
    flight.note(delta(1, 10, 11, 12), 101.0)
    flight.note(delta(2, 10, 11), 101.0)
    assert flight.num_tokens == 7
    flight.note(end(1, 13, 14), 102.0)
    assert flight.num_tokens == 6


def test_a_token_proves_that_the_request_is_not_what_replicas_are_lost_by() -> None:
    flight = flight_of(2)
    flight.num_losses = 3
    flight.note(delta(1, 10), 101.0)
    assert flight.num_losses == 0


def test_a_handle_yields_all_news_and_ends_with_the_last_output() -> None:
    flight = flight_of(2)
    news = [delta(0, 10), end(1, 20), delta(0, 11), end(0, 12)]

    async def collect() -> list[OutputDelta]:
        handle = handle_of(flight, "text")
        assert (handle.request_id, handle.prompt) == ("a", "text")
        assert handle.prompt_token_ids == PROMPT

        async def deliver() -> None:
            for one in news:
                await asyncio.sleep(0)
                handle.put(one)

        delivering = asyncio.create_task(deliver())
        found = [one async for one in handle]
        await delivering
        # Nothing more comes, however often one asks.
        assert [one async for one in handle] == []
        return found

    assert asyncio.run(asyncio.wait_for(collect(), PATIENCE_S)) == news


def test_a_handle_waits_for_outputs_that_have_not_ended() -> None:
    async def collect() -> list[OutputDelta]:
        handle = handle_of(flight_of(2))
        handle.put(end(0))
        found = []

        async def read() -> None:
            async for one in handle:
                found.append(one)

        reading = asyncio.create_task(read())
        for _ in range(10):
            await asyncio.sleep(0)
        assert found == [end(0)]
        assert not reading.done()
        handle.put(end(1))
        await reading
        return found

    assert asyncio.run(asyncio.wait_for(collect(), PATIENCE_S)) == [end(0), end(1)]


def test_whoever_aborts_a_handle_names_its_request() -> None:
    aborted: list[str] = []
    handle_of(flight_of(1), abort=aborted.append).abort()
    assert aborted == ["a"]


def test_a_flight_ends_for_those_outputs_that_have_not_ended() -> None:
    flight = flight_of(3)
    flight.note(delta(0, 10), 101.0)
    flight.note(end(1, 11), 101.0)
    error = GenerationError("no luck")
    last = ending(flight, FinishReason.ERROR, error)
    assert [(one.request_id, one.index) for one in last] == [("a", 0), ("a", 2)]
    for one in last:
        assert (one.finish_reason, one.error, one.token_ids) == (FinishReason.ERROR, error, ())
    (aborted, _) = ending(flight, FinishReason.ABORT, None)
    assert (aborted.finish_reason, aborted.error) == (FinishReason.ABORT, None)
