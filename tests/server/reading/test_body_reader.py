"""Which bodies are read where."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from waiting import PATIENCE_S

from minserve.server.reading.body_reader import LONG, SHORT, BodyReader
from minserve.server.reading.reader import Facts


def body_of(size: int) -> bytes:
    """Return the body of /tokenize with so many bytes."""
    empty = json.dumps({"prompt": ""})
    return json.dumps({"prompt": ("a " * size)[: size - len(empty)]}).encode()


def readers() -> set[psutil.Process]:
    """Return the processes in which this one has bodies read, also those of other tests' servers."""
    children = psutil.Process().children()
    return {one for one in children if "minserve.server.reading.child" in one.cmdline()}


def test_neither_a_short_nor_a_middle_body_waits_for_a_long_one(facts: Facts) -> None:
    async def ask_all() -> None:
        others, bodies = readers(), BodyReader(facts, 2**20)

        async def tokenize(request: web.Request) -> web.Response:
            answer, _ = await bodies.tokenized(request)
            return web.Response(body=answer)

        app = web.Application(client_max_size=2**20)
        app.router.add_post("/", tokenize)
        async with TestClient(TestServer(app)) as client:

            async def ask(size: int) -> None:
                async with client.post("/", data=body_of(size)) as answer:
                    assert answer.status == 200

            await ask(LONG + 1)
            (child,) = readers() - others
            child.send_signal(signal.SIGSTOP)
            long = asyncio.create_task(ask(LONG + 1))
            await asyncio.gather(ask(10), ask(SHORT + 1), ask(LONG))
            assert not long.done()
            child.send_signal(signal.SIGCONT)
            await long
        await bodies.close()
        assert not child.is_running()

    asyncio.run(asyncio.wait_for(ask_all(), PATIENCE_S))


@pytest.mark.parametrize(("size", "niceness"), [(LONG, 5), (LONG + 1, 19)])
def test_long_bodies_leave_the_cores_to_all_others(facts: Facts, size: int, niceness: int) -> None:
    async def look() -> set[int]:
        others, bodies = readers(), BodyReader(facts, 2**20)
        await bodies._call("tokenized", body_of(size))
        (child,) = readers() - others
        found = {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in child.threads()}
        await bodies.close()
        return found

    assert asyncio.run(look()) == {min(psutil.Process().nice() + niceness, 19)}
