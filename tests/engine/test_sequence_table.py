"""The books of who waits and who runs, and when a request counts as begun."""

from __future__ import annotations

import pytest

from minserve.engine.live_output import LiveOutput
from minserve.engine.sequence_table import SequenceTable
from minserve.request import Request, Sequence, SequenceState
from minserve.sampling_params import SamplingParams


def outputs(name: str, n: int, priority: int = 0) -> list[Sequence]:
    request = Request(
        request_id=name,
        prompt_token_ids=(5, 6),
        params=SamplingParams(n=n, max_tokens=4),
        seed=0,
        arrival_s=0.0,
        priority=priority,
    )
    return [Sequence(request, index) for index in range(n)]


@pytest.fixture
def table() -> SequenceTable:
    return SequenceTable()


def test_sequences_wait_and_run_in_rank_order(table: SequenceTable) -> None:
    (late,), (early,) = outputs("late", 1, priority=2), outputs("early", 1, priority=1)
    for seq in (late, early):
        table.add(LiveOutput(seq, None))
    assert table.waiting == [early, late]
    for seq in (late, early):
        table.run(seq)
    assert (table.waiting, table.running) == ([], [early, late])
    assert early.state is late.state is SequenceState.RUNNING
    table.wait(early)
    assert (table.waiting, table.running) == ([early], [late])
    for seq in (late, early):
        table.remove(seq)
    assert (table.waiting, table.running) == ([], [])
    assert (table.outputs, table.request_ids) == ({}, [])


def test_a_request_has_begun_also_when_the_output_that_began_is_gone(table: SequenceTable) -> None:
    first, second, third = outputs("r", 3)
    for seq in (first, second, third):
        table.add(LiveOutput(seq, None))
    assert not table.has_begun("r")
    table.remove(third)
    assert not table.has_begun("r"), "what waited has not begun"
    table.run(first)
    assert table.has_begun("r")
    first.token_ids.append(7)
    table.remove(first)
    assert table.has_begun("r"), "its client has a token"
    table.remove(second)
    (again,) = outputs("r", 1)
    table.add(LiveOutput(again, None))
    assert not table.has_begun("r"), "another request of that name"


def test_an_unknown_request_has_no_outputs_and_has_not_begun(table: SequenceTable) -> None:
    assert table.of_request("nobody") == []
    assert not table.has_begun("nobody")
