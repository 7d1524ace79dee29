"""The controller asks its replicas what they did; those that do not answer hold up nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from played import Outbox, say

from minserve.activity import Activity, Cursor
from minserve.controller import lookout
from minserve.controller import messages as m
from minserve.controller.controller import Controller

CURSOR = Cursor("process", 7)


def activity(source: str) -> Activity:
    return Activity(
        source=source, tick=9, is_whole=True, now_s=1.0, waiting={}, running={}, iterations=(),
        lanes=(), ends=(),
    )  # fmt: skip


def looks(outbox: Outbox) -> list[m.Look]:
    return [one for one in outbox.sent if isinstance(one, m.Look)]


def test_answers_come_together_and_a_silent_replica_is_left_out(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookout, "ANSWER_S", 0.05)

    async def test(controller: Controller, outboxes: list[Outbox]) -> None:
        asked = asyncio.create_task(controller.activity_by_replica({"1": CURSOR}))
        await asyncio.sleep(0)
        (first,), (second,), (third,) = map(looks, outboxes)
        assert [one.since for one in (first, second, third)] == [None, CURSOR, None]
        say(controller, 1, m.Seen(number=second.number, activity=activity("second")))
        say(controller, 0, m.Seen(number=first.number, activity=activity("first")))
        seen = await asked
        assert {name: one.source for name, one in seen.items()} == {"0": "first", "1": "second"}
        # Its answer comes when nobody waits for it any more, and harms nothing.
        say(controller, 2, m.Seen(number=third.number, activity=activity("third")))
        assert all(replica.is_connected for replica in controller.table.replicas)

    run(test)


def test_without_a_replica_there_is_nothing_to_wait_for(run: Callable[..., None]) -> None:
    async def test(controller: Controller, _: list[Outbox]) -> None:
        for replica in controller.table.replicas:
            replica.mailbox = None
        assert await controller.activity_by_replica({}) == {}

    run(test)
