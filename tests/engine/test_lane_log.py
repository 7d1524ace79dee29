"""A lane's marks: none of its tokens gets lost, and there are only so many marks."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from minserve.activity import Mark
from minserve.engine.lane_log import MAX_MARKS, LaneLog
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams


def lane() -> LaneLog:
    params = SamplingParams(max_tokens=10)
    request = Request(request_id="a", prompt_token_ids=(1, 2), params=params, seed=0, arrival_s=0.0)
    return LaneLog(Sequence(request), 0, 0.0)


@pytest.mark.parametrize("num", [50, 500, 5000])
def test_joined_marks_hold_all_tokens_in_order(num: int) -> None:
    log, rng = lane(), random.Random(num)
    now, slacks, last = 0.0, [], None
    for tick in range(1, num + 1):
        now += rng.random()
        slacks.append(rng.uniform(-1, 1))
        is_prefill = tick <= num // 3
        log.add(tick, Mark(is_prefill, now - 0.1 if is_prefill else now, now, tick, slacks[-1]))
        # What is told in parts is what is told at once.
        seen = log.since(tick - 1)
        before = () if last is None else last.marks[: seen.first_mark]
        last = log.since(0)
        assert (*before, *seen.marks) == last.marks
    marks = log.since(0).marks
    assert len(marks) <= MAX_MARKS + 1
    assert sum(mark.num_tokens for mark in marks) == num * (num + 1) // 2
    assert min(mark.slack_s for mark in marks if mark.slack_s is not None) == min(slacks)
    assert all(one.to_s <= other.to_s for one, other in pairwise(marks))
    assert marks[-1].to_s == now


def test_marks_that_cannot_be_joined_are_bounded_too() -> None:
    log = lane()
    for tick in range(1, 2000):
        log.add(tick, Mark(bool(tick % 2), tick, tick, 1, None))
        assert len(log.since(0).marks) <= MAX_MARKS + 1
    assert log.since(0).marks[-1].to_s == 1999
