"""What a controller does with what its replicas tell it. Only their processes are missing here:
what it would send is kept, and what they would say is said by the tests.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from played import (
    FULL,
    IDLE,
    PROMPT,
    Outbox,
    join,
    lose,
    report,
    say,
    submit,
    submitted,
    tokens,
    where,
)
from waiting import PATIENCE_S

from minserve.config import EngineConfig
from minserve.controller import dispatcher as dispatcher_module
from minserve.controller import messages as m
from minserve.controller.controller import Controller
from minserve.controller.rendezvous import Rendezvous
from minserve.controller.replicas import ReplicaState
from minserve.engine.stats import EngineStats
from minserve.errors import (
    InvalidRequestError,
    NoReplicaError,
    SLOUnattainableError,
)
from minserve.outputs import OutputDelta
from minserve.planner.replica_load import ReplicaLoad
from minserve.process_config import ControllerConfig
from minserve.request import FinishReason
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO


def test_the_controller_resolves_the_models_own_settings(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "tiny")
    (model / "generation_config.json").write_text('{"top_k": 7, "max_new_tokens": 9}')

    async def main() -> None:
        controller = Controller(
            EngineConfig(model=str(model)),
            ControllerConfig(replicas=1),
            Rendezvous("127.0.0.1", 0, 1),
        )
        controller._accepting = True
        outbox = join(controller, 0)
        assert controller.sampling_defaults == {"top_k": 7, "max_tokens": 9}
        controller.submit([PROMPT], SamplingParams(max_tokens=None))
        (sent,) = submitted(outbox)
        assert sent.request.params.max_tokens == 9

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.mark.parametrize("router", ["slo", "least-loaded"])
def test_a_report_from_before_a_request_came_does_not_hide_it(run: Callable, router: str) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        def place() -> int:
            return where(
                controller, submit(controller, cache_salt=str(len(controller._dispatcher._flights)))
            )

        first = place()
        # The iteration that was running when it came has ended.
        say(controller, first, m.News(load=IDLE))
        second = place()
        assert second != first
        say(controller, first, m.News(load=IDLE, num_taken=1))
        assert place() == first

    run(test, router=router)


def test_a_request_that_is_declined_moves_on_with_its_arrival_kept(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller)
        first = where(controller, handle)
        later = SimpleNamespace(monotonic=lambda: time.monotonic() + 0.05)
        monkeypatch.setattr(dispatcher_module, "time", later)
        say(controller, first, m.News(declined=(handle.request_id,), load=FULL))
        assert outboxes[first].sent[-1] == m.Withdraw(handle.request_id)
        say(controller, first, m.Withdrawn(handle.request_id))
        second = where(controller, handle)
        assert second != first
        (asked,) = submitted(outboxes[second])
        assert asked.request.request_id == handle.request_id
        assert asked.age_s >= 0.05
        assert controller.routing.num_hops == 1

    run(test)


def test_a_request_that_has_begun_stays(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller)
        first = where(controller, handle)
        say(controller, first, tokens(handle, 7))
        say(controller, first, m.News(declined=(handle.request_id,), load=FULL))
        assert not any(isinstance(one, m.Withdraw) for one in outboxes[first].sent)
        assert where(controller, handle) == first

    run(test)


def test_nobody_moves_on_beyond_the_hop_limit_or_where_nobody_can_keep_it(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller)
        seen = []
        for _ in range(3):
            number = where(controller, handle)
            seen.append(number)
            say(controller, number, m.News(declined=(handle.request_id,), load=FULL))
            if outboxes[number].sent[-1] == m.Withdraw(handle.request_id):
                say(controller, number, m.Withdrawn(handle.request_id))
        assert controller.routing.num_hops == 1
        assert seen[1] == seen[2] != seen[0]

    async def crowded(controller: Controller, outboxes: list[Outbox]) -> None:
        for number in range(3):
            report(controller, number, FULL)
        handle = submit(controller)
        number = where(controller, handle)
        say(controller, number, m.News(declined=(handle.request_id,), load=FULL))
        assert where(controller, handle) == number
        assert not any(isinstance(one, m.Withdraw) for one in outboxes[number].sent)

    run(test, hop_limit=1)
    run(crowded)


def test_a_refusal_reaches_the_client_only_where_no_other_replica_can_keep_it(
    run: Callable,
) -> None:
    refusal = SLOUnattainableError("no room", reason="memory", retry_after_s=1.5)
    slo = SLO(ttft=1.0, tpot=0.1, on_unattainable="reject")

    async def test(controller: Controller, _: list[Outbox]) -> None:
        handle = submit(controller, slo)
        refused = tokens(handle, finish_reason=FinishReason.ERROR, error=refusal)
        first = where(controller, handle)
        report(controller, first, FULL)
        say(controller, first, refused)
        second = where(controller, handle)
        assert second != first
        for number in range(3):
            report(controller, number, FULL)
        say(controller, second, refused)
        (delta,) = [one async for one in handle]
        assert str(delta.error) == "no room"
        assert controller.num_unfinished == 0

    run(test)


def test_all_outputs_of_a_request_are_refused_once_one_is(run: Callable) -> None:
    refusal = SLOUnattainableError("no room", reason="memory", retry_after_s=1.5)
    slo = SLO(ttft=1.0, tpot=0.1, on_unattainable="reject")

    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        two = SamplingParams(n=2, max_tokens=20)
        (handle,) = controller.submit([PROMPT], two, slo=slo)
        number = where(controller, handle)
        for other in range(3):
            report(controller, other, FULL)
        for index in range(2):
            end = OutputDelta(
                handle.request_id, index, finish_reason=FinishReason.ERROR, error=refusal
            )
            say(controller, number, m.News(deltas=(end,)))
            # Now another one would have room.
            for other in range(3):
                report(controller, other, IDLE)
        ends = [one async for one in handle]
        assert [(one.index, str(one.error)) for one in ends] == [(0, "no room"), (1, "no room")]
        assert sum(len(submitted(outbox)) for outbox in outboxes) == 1
        assert controller.num_unfinished == 0

    run(test)


def test_what_a_lost_replica_ran_goes_on_behind_what_was_delivered(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller)
        first = where(controller, handle)
        say(controller, first, tokens(handle, 7, 8))
        lose(controller, first)
        second = where(controller, handle)
        assert second != first
        (asked,) = submitted(outboxes[second])
        assert asked.outputs[0].token_ids == (7, 8)
        assert controller.routing.num_resumed == 1
        # What the lost one may still say is not heard.
        say(controller, first, tokens(handle, 9))
        say(controller, second, tokens(handle, 9, finish_reason=FinishReason.LENGTH))
        found = [token for delta in [one async for one in handle] for token in delta.token_ids]
        assert found == [7, 8, 9]

    run(test)


def test_without_replicas_nothing_new_is_taken_and_what_runs_waits(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        handle = submit(controller)
        for number in range(3):
            lose(controller, number)
        assert not controller.is_healthy
        with pytest.raises(NoReplicaError):
            submit(controller)
        assert where(controller, handle) is None
        (asked,) = submitted(join(controller, 2))
        assert asked.request.request_id == handle.request_id
        assert controller.is_healthy

    run(test)


def test_a_chat_that_comes_back_goes_where_its_prefix_is(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        for number in range(3):
            report(controller, number, ReplicaLoad(free_tokens=10**5, prefill_tokens=50 - number))
        handle = submit(controller)
        assert where(controller, handle) == 2
        say(controller, 2, tokens(handle, 7, finish_reason=FinishReason.LENGTH))
        # A little busier than the others, but 96 tokens of the prompt are there.
        report(controller, 2, ReplicaLoad(free_tokens=10**5, prefill_tokens=100))
        assert where(controller, submit(controller)) == 2
        report(controller, 2, ReplicaLoad(free_tokens=10**5, prefill_tokens=1000))
        assert where(controller, submit(controller)) != 2
        # Another tenant's, though the same.
        report(controller, 2, ReplicaLoad(free_tokens=10**5, prefill_tokens=100))
        assert where(controller, submit(controller, cache_salt="other")) != 2

    run(test)


def test_requests_without_an_slo_are_spread_though_no_report_counts_them_as_owed(
    run: Callable,
) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        placed = []
        for _ in range(9):
            handle = submit(controller, None, cache_salt=str(len(placed)))
            placed.append(where(controller, handle))
            load = ReplicaLoad(free_tokens=10**5, num_sequences=placed.count(placed[-1]))
            report(controller, placed[-1], load)
        assert sorted(placed) == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    run(test)


def test_a_request_that_waits_for_any_replica_is_placed_once(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        lose(controller, 2)
        handle = submit(controller)
        first = where(controller, handle)
        say(controller, first, m.News(declined=(handle.request_id,), load=FULL))
        controller.table.replicas[first].enter(ReplicaState.DRAINING)
        lose(controller, 1 - first)
        # Given back, with nowhere to go: then the replica has nothing left, and may go too.
        say(controller, first, m.Withdrawn(handle.request_id))
        assert where(controller, handle) is None
        assert controller.table.replicas[first].state is ReplicaState.DRAINED
        lose(controller, first)
        assert len(submitted(join(controller, 2))) == 1

    run(test)


def test_a_restart_that_meets_a_resumption_ends_nothing(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller)
        number = where(controller, handle)
        restarting = asyncio.create_task(controller.restart(number))
        await asyncio.sleep(0)
        assert controller.table.replicas[number].state is ReplicaState.DRAINING
        await controller.resume(number)
        with pytest.raises(InvalidRequestError, match="was resumed while it drained"):
            await restarting
        assert not any(isinstance(one, m.Stop) for one in outboxes[number].sent)
        say(controller, number, tokens(handle, 7, finish_reason=FinishReason.LENGTH))
        assert [delta.token_ids async for delta in handle] == [(7,)]

    run(test)


def test_signs_of_life_say_how_a_replica_stands(run: Callable) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        for number in range(3):
            report(controller, number, FULL)
        stats = m.Heartbeat(stats=EngineStats(), load=IDLE, num_taken=0)
        say(controller, 1, stats)
        assert where(controller, submit(controller)) == 1

    run(test)


def test_whoever_wants_nothing_more_is_told_the_end_by_its_replica(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller)
        number = where(controller, handle)
        handle.complete()
        assert outboxes[number].sent[-1] == m.Abort(handle.request_id, has_all=True)
        assert controller.num_unfinished == 1
        end = OutputDelta(handle.request_id, 0, finish_reason=FinishReason.STOP)
        say(controller, number, m.News(deltas=(end,)))
        assert [one async for one in handle] == [end]
        assert controller.num_unfinished == 0

    run(test)


def test_whoever_leaves_is_aborted_at_its_replica(run: Callable) -> None:
    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        handle = submit(controller)
        number = where(controller, handle)
        handle.abort()
        handle.abort()
        assert outboxes[number].sent[-1] == m.Abort(handle.request_id)
        (delta,) = [one async for one in handle]
        assert delta.finish_reason is FinishReason.ABORT
        assert controller.num_unfinished == 0

    run(test)
