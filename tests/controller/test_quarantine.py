"""Who is ended when replicas are lost, and who is not, whatever happens beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from played import IDLE, PARAMS, Outbox, join, lose, report, say, submit, submitted, tokens, where

from minserve.controller import dispatcher as dispatcher_module
from minserve.controller import messages as m
from minserve.controller.controller import Controller
from minserve.controller.flights import FlightHandle
from minserve.controller.quarantine import ISOLATING_LOSSES, MOST_LOSSES, PROOF_TOKENS, WARD_S
from minserve.errors import GenerationError, ProtocolError, ReplicaHungError
from minserve.outputs import OutputDelta
from minserve.planner.replica_load import ReplicaLoad
from minserve.request import FinishReason
from minserve.sampling_params import SamplingParams

FAULT = ReplicaHungError("an iteration hangs")


async def error_of(handle: FlightHandle) -> str:
    """What the client of a request that has ended was told."""
    *_, last = [delta async for delta in handle]
    assert isinstance(last.error, GenerationError)
    return str(last.error)


def test_a_request_that_kills_two_replicas_is_ended_with_an_error_that_says_so(
    run: Callable,
) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        handle = submit(controller)
        lose(controller, where(controller, handle), FAULT)
        lose(controller, where(controller, handle), FAULT)
        assert "this request ends the process that runs it" in await error_of(handle)
        assert controller.num_unfinished == 0

    run(test)


def test_suspects_run_alone_and_one_after_the_other_and_the_rest_goes_on(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        handles = [submit(controller) for _ in range(3)]
        lose(controller, 1)
        first, second, third = handles
        for handle in handles:
            if where(controller, handle) == 1:
                raise AssertionError
        # All on one replica, which is lost by a fault of one of them.
        lose(controller, 2)
        assert [where(controller, handle) for handle in handles] == [0, 0, 0]
        lose(controller, 0, FAULT)
        outbox = join(controller, 0)
        # The newest first, since none has a token.
        assert [where(controller, handle) for handle in handles] == [None, None, 0]
        newcomer = submit(controller)
        assert where(controller, newcomer) is None
        other = join(controller, 1)
        assert [len(submitted(one)) for one in (outbox, other)] == [1, 1]
        assert where(controller, newcomer) == 1
        lose(controller, 0, FAULT)
        assert "ends the process" in await error_of(third)
        # That says nothing for the others: they have to run alone too.
        assert [where(controller, one) for one in (first, second, newcomer)] == [None, None, 1]

    run(test)


def test_a_suspect_that_brings_tokens_gives_its_ward_to_the_next_one(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        for number in (1, 2):
            lose(controller, number)
        first, second = submit(controller), submit(controller)
        say(controller, 0, tokens(first, 7))
        lose(controller, 0, FAULT)
        outbox = join(controller, 0)
        assert (where(controller, first), where(controller, second)) == (None, 0)
        say(controller, 0, tokens(second, *range(PROOF_TOKENS - 1)))
        assert where(controller, first) is None
        say(controller, 0, tokens(second, 9))
        # It has left, and the other one comes once the replica has said that it is idle.
        assert outbox.sent[-1] == m.Abort(second.request_id)
        assert (where(controller, first), where(controller, second)) == (None, None)
        report(controller, 0, ReplicaLoad(num_sequences=1))
        assert where(controller, first) is None
        report(controller, 0, IDLE)
        assert (where(controller, first), where(controller, second)) == (0, None)
        assert submitted(outbox)[-1].outputs[0].token_ids == (7,)
        # With the last suspect cleared, the replica is there for all again.
        say(controller, 0, tokens(first, *range(PROOF_TOKENS)))
        assert (where(controller, first), where(controller, second)) == (0, 0)

    run(test)


def test_each_output_of_a_suspect_has_to_bring_tokens(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        two = SamplingParams(n=2, max_tokens=40)
        (handle,) = controller.submit([[5, 6, 7]], two)
        lose(controller, where(controller, handle), FAULT)
        number = where(controller, handle)
        say(controller, number, tokens(handle, *range(PROOF_TOKENS)))
        lose(controller, number, FAULT)
        errors = [delta.error async for delta in handle if delta.finish_reason is not None]
        assert [type(error) for error in errors] == [GenerationError] * 2

    run(test)


def test_losses_that_accuse_nobody_end_nobody_until_it_is_beyond_chance(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        handle, neighbour = submit(controller), submit(controller)
        for count in range(1, MOST_LOSSES + 1):
            number = where(controller, handle)
            lone = where(controller, neighbour) != number
            assert lone or count <= ISOLATING_LOSSES
            lose(controller, number)
            join(controller, number)
            say(controller, where(controller, neighbour), tokens(neighbour, 5))
        assert "ends the process" in await error_of(handle)
        assert where(controller, neighbour) is not None

    run(test)


def test_a_loss_without_a_fault_does_not_convict_a_suspect(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        handle = submit(controller)
        lose(controller, where(controller, handle), FAULT)
        for error in (None, ProtocolError("gibberish")):
            lose(controller, where(controller, handle), error)
            join(controller, 0)
            assert where(controller, handle) is not None
        lose(controller, where(controller, handle), FAULT)
        assert "ends the process" in await error_of(handle)

    run(test)


def test_suspects_get_a_busy_replica_where_no_other_comes(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        lose(controller, 2)
        suspect = submit(controller)
        number = where(controller, suspect)
        busy = 1 - number
        neighbour = submit(controller)
        assert where(controller, neighbour) == busy
        lose(controller, number, FAULT)
        report(controller, busy, ReplicaLoad(num_sequences=1))
        assert where(controller, suspect) is None
        now = dispatcher_module.time.monotonic()
        monkeypatch.setattr(dispatcher_module.time, "monotonic", lambda: now + WARD_S + 1)
        report(controller, busy, ReplicaLoad(num_sequences=1))
        assert outboxes[busy].sent[-1] == m.Abort(neighbour.request_id)
        report(controller, busy, IDLE)
        assert (where(controller, suspect), where(controller, neighbour)) == (busy, None)
        say(controller, busy, tokens(suspect, *range(PROOF_TOKENS)))
        assert where(controller, neighbour) == busy

    run(test)


def test_whoever_leaves_while_suspect_leaves_nothing_behind(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        for number in (1, 2):
            lose(controller, number)
        handles = [submit(controller) for _ in range(3)]
        lose(controller, 0, FAULT)
        join(controller, 0)
        for handle in handles:
            handle.abort()
        assert controller.num_unfinished == 0
        fresh = submit(controller)
        assert where(controller, fresh) is None
        report(controller, 0, IDLE)
        assert where(controller, fresh) == 0

    run(test)


@pytest.mark.parametrize(
    "delta",
    [{"index": 7}, {"index": -1}, {"index": 0, "finish_reason": FinishReason.LENGTH}],
    ids=["no output", "negative", "ended twice"],
)
def test_news_that_make_no_sense_end_the_connection_of_their_replica_alone(
    run: Callable, delta: dict
) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        (handle,) = controller.submit([[5, 6, 7]], SamplingParams(n=2, max_tokens=40))
        number = where(controller, handle)
        say(controller, number, tokens(handle, 4, finish_reason=FinishReason.LENGTH))
        say(controller, number, m.News(deltas=(OutputDelta(handle.request_id, **delta),)))
        assert not controller.table.replicas[number].is_connected
        assert where(controller, handle) not in (None, number)
        assert controller.num_unfinished == 1

    run(test)


class Played:
    """Replicas that run what they are sent; some requests kill what runs them."""

    def __init__(
        self, controller: Controller, outboxes: Iterable[Outbox], deadly: dict[str, int]
    ) -> None:
        self.controller, self.outboxes, self.deadly = controller, list(outboxes), deadly
        self.running: list[dict[str, int]] = [{} for _ in self.outboxes]
        self.deaths: list[str] = []

    def iterate(self, number: int, *, delivers: bool) -> None:
        """One iteration of a replica, of which the client may never hear."""
        outbox, running = self.outboxes[number], self.running[number]
        for message in outbox.sent:
            if isinstance(message, m.Submit):
                (resumed,) = message.outputs.values()
                running[message.request.request_id] = len(resumed.token_ids)
            elif isinstance(message, m.Abort):
                running.pop(message.request_id, None)
        outbox.sent.clear()
        for request_id, num_tokens in running.items():
            if self.deadly.get(request_id) == num_tokens:
                self.deaths.append(request_id)
                self.lose(number, FAULT)
                return
        if delivers:
            deltas = []
            for request_id, num_tokens in list(running.items()):
                ends = num_tokens + 1 == PARAMS.max_tokens
                reason = FinishReason.LENGTH if ends else None
                deltas.append(
                    OutputDelta(request_id, 0, token_ids=(num_tokens,), finish_reason=reason)
                )
                running[request_id] += 1
                if ends:
                    del running[request_id]
            taken = self.controller.table.replicas[number].num_submitted
            load = ReplicaLoad(free_tokens=10**5, num_sequences=len(running))
            say(self.controller, number, m.News(deltas=tuple(deltas), load=load, num_taken=taken))

    def lose(self, number: int, error: Exception | None = None) -> None:
        self.running[number].clear()
        lose(self.controller, number, error)


@pytest.mark.parametrize("seed", range(8))
def test_only_what_kills_is_ended_and_after_two_losses_whatever_else_is_lost(
    run: Callable, seed: int
) -> None:
    rng = random.Random(seed)

    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        deadly: dict[str, int] = {}
        played = Played(controller, outboxes, deadly)
        handles: list[FlightHandle] = []
        for step in range(3000):
            if len(handles) < 30 and controller.is_healthy and rng.random() < 0.2:
                handles.append(submit(controller, None, cache_salt=str(step)))
                if rng.random() < 0.15:
                    deadly[handles[-1].request_id] = rng.randrange(PARAMS.max_tokens)
            for number, replica in enumerate(controller.table.replicas):
                if not replica.is_connected:
                    if rng.random() < 0.3:
                        played.outboxes[number] = join(controller, number)
                elif rng.random() < 0.01:
                    played.lose(number)
                elif rng.random() < 0.6:
                    played.iterate(number, delivers=rng.random() < 0.8)
        assert controller.num_unfinished == 0
        assert len(handles) == 30
        for handle in handles:
            found = [delta async for delta in handle]
            got = [token for delta in found for token in delta.token_ids]
            kills = played.deaths.count(handle.request_id)
            if found[-1].error is None:
                assert handle.request_id not in deadly
                assert got == list(range(PARAMS.max_tokens))
            else:
                assert 1 <= kills <= 2

    run(test)
