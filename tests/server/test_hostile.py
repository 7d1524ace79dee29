"""What hostile clients send, from `bench/hostile.py`'s own table, against a server in this process."""

from __future__ import annotations

import asyncio

import pytest
from live_server import RunningServer

from parts.hostile.case import Limits, Target
from parts.hostile.runner import run_cases
from parts.hostile.table import all_cases
from parts.hostile.wire import Address

# Of large families a part is run here; the program runs all.
MOST = 30
LIGHT = [case for case in all_cases() if not case.slow and not case.needs]
FAMILIES = list(dict.fromkeys(case.family for case in LIGHT))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_refused_neighbours_feel_nothing_and_the_next_is_served(
    server: RunningServer, family: str
) -> None:
    limits = Limits(
        max_model_len=server.engine.max_model_len,
        vocab_size=server.engine.vocab_size,
        max_body=2**20,
        max_queue=server.engine.config.max_queue,
    )
    target = Target(Address("127.0.0.1", server.port), limits)
    cases = [case for case in LIGHT if case.family == family]
    outcomes = asyncio.run(run_cases(target, cases[:: 1 + len(cases) // MOST]))
    assert {one.case.name: one.problems for one in outcomes if one.problems} == {}
