"""Blocks held for the next call of a task: evicted last, for a time, and never in anyone's way."""

from __future__ import annotations

from itertools import count

import pytest

from minserve.engine.block_pool import HELD_SHARE, BlockPool, HoldWish
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

BLOCK = 4
_ids = count()


def sequence(first: int, num_blocks: int) -> Sequence:
    """A sequence of whole blocks and one token, which shares its beginning with no other first."""
    request = Request(
        request_id=f"h{next(_ids)}",
        prompt_token_ids=(first, *range(1, num_blocks * BLOCK + 1)),
        params=SamplingParams(max_tokens=100),
        seed=0,
        arrival_s=0.0,
    )
    return Sequence(request)


def run(pool: BlockPool, first: int, num_blocks: int, until: float | None = None) -> None:
    """Let a sequence come and go."""
    seq = sequence(first, num_blocks)
    seq.num_computed_tokens = pool.attach(seq)
    num_tokens = num_blocks * BLOCK - seq.num_computed_tokens
    pool.grow(seq, num_tokens)
    seq.num_computed_tokens += num_tokens
    pool.commit(seq)
    pool.release(seq, None if until is None else HoldWish(first, until))
    pool.check_integrity([])


def cached(pool: BlockPool, first: int, num_blocks: int = 4) -> int:
    return pool.cached_prefix(sequence(first, num_blocks)).num_tokens // BLOCK


def flood(pool: BlockPool, first: int, times: int) -> None:
    """Let so many others come and go, each with a quarter of the pool."""
    for number in range(times):
        run(pool, first + number, pool.num_blocks // 4)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(16, BLOCK)


def test_a_held_prefix_outlives_others_that_were_used_later(pool):
    run(pool, 1000, 4, until=10.0)
    run(pool, 2000, 4)
    assert (pool.num_free_blocks, pool.num_held_blocks) == (16, 4)
    flood(pool, 3000, 9)
    assert (cached(pool, 1000), cached(pool, 2000)) == (4, 0)
    # The next call takes its blocks from the hold, as any prefix hit.
    run(pool, 1000, 4)
    assert pool.num_held_blocks == 0
    flood(pool, 4000, 4)
    assert cached(pool, 1000) == 0


def test_a_hold_ends_by_itself(pool):
    run(pool, 1000, 4, until=10.0)
    pool.end_holds(9.9)
    assert pool.num_held_blocks == 4
    pool.end_holds(10.0)
    assert (pool.num_free_blocks, pool.num_held_blocks) == (16, 0)
    assert cached(pool, 1000) == 4
    flood(pool, 3000, 4)
    assert cached(pool, 1000) == 0


def test_holds_end_each_at_its_time_in_any_order(pool):
    for first, until in ((1000, 30.0), (2000, 10.0), (3000, 20.0)):
        run(pool, first, 2, until)
    for now, held in ((9.0, 6), (10.0, 4), (25.0, 2), (31.0, 0)):
        pool.end_holds(now)
        assert pool.num_held_blocks == held


def test_held_blocks_are_handed_out_when_nothing_else_is_free(pool):
    run(pool, 1000, 4, until=10.0)
    run(pool, 2000, 16)
    assert pool.num_held_blocks == 0
    assert cached(pool, 1000) == 0
    assert cached(pool, 2000, 16) == 16


def test_no_more_than_a_share_is_held_and_the_oldest_hold_goes_first(pool):
    most = int(HELD_SHARE * pool.num_blocks)
    for first in (1000, 2000, 3000):
        run(pool, first, 4, until=10.0)
        assert pool.num_held_blocks <= most
    flood(pool, 4000, 8)
    assert [cached(pool, first) for first in (1000, 2000, 3000)] == [0, 4, 4]
    # Of a prefix that is longer than the share its beginning is held.
    run(pool, 5000, 12, until=10.0)
    flood(pool, 6000, 8)
    assert cached(pool, 5000, 12) == most


def test_blocks_that_others_still_use_are_not_held(pool):
    seq = sequence(1000, 4)
    pool.grow(seq, 4 * BLOCK)
    seq.num_computed_tokens = 4 * BLOCK
    pool.commit(seq)
    other = sequence(1000, 4)
    other.num_computed_tokens = pool.attach(other)
    pool.release(seq, HoldWish("a", 10.0))
    assert pool.num_held_blocks == 0
    pool.check_integrity([other])
    pool.release(other, HoldWish("a", 10.0))
    assert pool.num_held_blocks == 4


def test_what_may_be_wrong_is_held_for_nobody(pool):
    seq = sequence(1000, 4)
    pool.grow(seq, 4 * BLOCK)
    seq.num_computed_tokens = 4 * BLOCK
    pool.commit(seq)
    pool.forget(seq)
    pool.release(seq, HoldWish("a", 10.0))
    assert (pool.num_held_blocks, pool.num_blank_blocks) == (0, 16)
    pool.check_integrity([])


def test_of_a_task_the_newest_prefix_is_held_and_nothing_behind_its_last_call(pool):
    for first, until, held in ((1000, 10.0, 3), (2000, 12.0, 2), (3000, None, 0)):
        seq = sequence(first, held or 4)
        pool.grow(seq, seq.num_tokens - 1)
        seq.num_computed_tokens = seq.num_tokens - 1
        pool.commit(seq)
        pool.release(seq, HoldWish("task", until))
        pool.check_integrity([])
        assert pool.num_held_blocks == held
        assert pool.num_free_blocks == 16


def test_a_prefix_of_two_tasks_is_held_for_the_one_that_used_it_last(pool):
    for owner, until in (("a", 10.0), ("b", 20.0)):
        seq = sequence(1000, 4)
        seq.num_computed_tokens = pool.attach(seq)
        pool.grow(seq, 4 * BLOCK - seq.num_computed_tokens)
        seq.num_computed_tokens = 4 * BLOCK
        pool.commit(seq)
        pool.release(seq, HoldWish(owner, until))
        pool.check_integrity([])
    pool.end_holds(15.0)
    assert pool.num_held_blocks == 4
    pool.end_holds(20.0)
    assert pool.num_held_blocks == 0
