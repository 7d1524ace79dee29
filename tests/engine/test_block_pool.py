"""The block pool: exact hits, exact counts, nothing leaked."""

from __future__ import annotations

import pytest
from pool_sequences import BLOCK, compute, make_seq, start, stop

from minserve.engine import block_pool
from minserve.engine.block_pool import BlockPool, block_digest
from minserve.errors import OutOfBlocksError, PoolCorruptedError
from minserve.planner.batching.batch_builder import BatchBuilder
from minserve.planner.plan import CachedPrefix, PlannerView

HOLD = block_pool._Hold("owner", 1.0, [], 1)


def test_blank_blocks_are_those_that_hold_no_prefix():
    pool = BlockPool(8, BLOCK)
    cached, running = make_seq(range(9)), make_seq(range(50, 55))
    start(pool, cached)
    stop(pool, cached)
    assert (pool.num_free_blocks, pool.num_blank_blocks) == (8, 6)
    start(pool, running)
    assert (pool.num_free_blocks, pool.num_blank_blocks) == (6, 4)
    other = make_seq(range(100, 100 + BLOCK * pool.num_blank_blocks))
    start(pool, other)
    assert pool.cached_prefix(make_seq(range(9))).num_tokens == 8
    assert pool.num_blank_blocks == 0


def test_grow_takes_whole_blocks_and_release_gives_them_back():
    pool = BlockPool(8, BLOCK)
    seq = make_seq(range(9))
    pool.grow(seq, 5)
    assert len(seq.block_table) == 2
    assert pool.num_free_blocks == 6
    seq.num_computed_tokens = 5
    pool.grow(seq, 3)
    assert len(seq.block_table) == 2
    pool.grow(seq, 4)
    assert len(seq.block_table) == 3
    pool.release(seq)
    assert seq.block_table == []
    assert pool.num_free_blocks == 8
    pool.check_integrity([])


def test_exhaustion_raises_and_changes_nothing():
    pool = BlockPool(4, BLOCK)
    holder, greedy = make_seq(range(12)), make_seq(range(100, 120))
    start(pool, holder)
    start_table = list(holder.block_table)
    greedy.num_computed_tokens = 0
    with pytest.raises(OutOfBlocksError, match="needs 2 more KV blocks, 1 of 4"):
        pool.grow(greedy, 5)
    assert greedy.block_table == []
    assert holder.block_table == start_table
    assert pool.num_free_blocks == 1
    pool.check_integrity([holder, greedy])
    pool.grow(greedy, 4)
    assert pool.num_free_blocks == 0


def test_failed_growth_keeps_idle_cached_blocks_findable():
    pool = BlockPool(4, BLOCK)
    first = make_seq(range(13))
    start(pool, first)
    stop(pool, first)
    with pytest.raises(OutOfBlocksError):
        pool.grow(make_seq(range(50, 90)), 40)
    assert pool.cached_prefix(make_seq(range(13))).num_tokens == 12


def test_prefix_is_shared_in_whole_blocks_and_never_covers_the_last_token():
    pool = BlockPool(16, BLOCK)
    first = make_seq(range(8))
    assert start(pool, first) == 0
    assert pool.cached_prefix(make_seq(range(8))) == CachedPrefix(4, 0)
    assert pool.cached_prefix(make_seq(range(9))) == CachedPrefix(8, 0)
    assert pool.cached_prefix(make_seq([0, 1, 2, 3, 9, 9, 9, 9, 9])) == CachedPrefix(4, 0)
    assert pool.cached_prefix(make_seq(range(3))) == CachedPrefix(0, 0)
    second = make_seq(range(10))
    assert start(pool, second) == 8
    assert second.block_table[:2] == first.block_table
    assert pool.num_free_blocks == 13
    pool.check_integrity([first, second])


def test_only_computed_tokens_are_indexed():
    pool = BlockPool(16, BLOCK)
    seq = make_seq(range(16))
    pool.grow(seq, 16)
    seq.num_computed_tokens = 7
    pool.commit(seq)
    assert pool.cached_prefix(make_seq(range(16))).num_tokens == 4


def test_generated_tokens_are_found_by_the_next_turn():
    pool = BlockPool(16, BLOCK)
    seq = make_seq(range(6))
    start(pool, seq)
    for token in (70, 71, 72):
        seq.token_ids.append(token)
        compute(pool, seq, 1)
    stop(pool, seq)
    turn = make_seq([*range(6), 70, 71, 72, 73])
    assert pool.cached_prefix(turn) == CachedPrefix(8, 2)


def test_preempted_sequence_finds_its_own_blocks_again():
    pool = BlockPool(16, BLOCK)
    seq = make_seq(range(11))
    start(pool, seq)
    hashes = list(seq.block_hashes)
    stop(pool, seq)
    seq.token_ids += [50, 51]
    assert pool.attach(seq) == 8
    assert seq.block_hashes[:2] == hashes
    pool.check_integrity([seq])


def test_salts_separate_equal_prompts():
    pool = BlockPool(16, BLOCK)
    start(pool, make_seq(range(9), salt="a"))
    assert pool.cached_prefix(make_seq(range(9), salt="b")).num_tokens == 0
    assert pool.cached_prefix(make_seq(range(9))).num_tokens == 0
    assert pool.cached_prefix(make_seq(range(9), salt="a")).num_tokens == 8


def test_prompt_logprobs_take_no_hit_and_are_not_counted():
    pool = BlockPool(16, BLOCK)
    start(pool, make_seq(range(9)))
    seq = make_seq(range(9), prompt_logprobs=0)
    assert pool.cached_prefix(seq) == CachedPrefix(0, 0)
    queries = pool.prefix_queries_tokens
    assert start(pool, seq) == 0
    assert pool.prefix_queries_tokens == queries


def test_caching_off_shares_nothing_and_keeps_no_index():
    pool = BlockPool(16, BLOCK, prefix_caching=False)
    first, second = make_seq(range(9)), make_seq(range(9))
    assert start(pool, first) == start(pool, second) == 0
    assert pool.cached_prefix(make_seq(range(9))) == CachedPrefix(0, 0)
    assert not set(first.block_table) & set(second.block_table)
    assert pool.prefix_queries_tokens == pool.prefix_hits_tokens == 0
    pool.check_integrity([first, second])


def test_hits_and_queries_are_counted_when_a_prefix_is_attached():
    pool = BlockPool(16, BLOCK)
    start(pool, make_seq(range(9)))
    assert (pool.prefix_queries_tokens, pool.prefix_hits_tokens) == (9, 0)
    other = make_seq(range(10))
    pool.cached_prefix(other)
    start(pool, other)
    assert (pool.prefix_queries_tokens, pool.prefix_hits_tokens) == (19, 8)


def test_what_a_preempted_sequence_finds_of_itself_is_no_hit():
    pool = BlockPool(16, BLOCK)
    seq = make_seq(range(9))
    start(pool, seq)
    pool.release(seq)
    seq.num_computed_tokens, seq.num_preemptions = 0, 1
    assert pool.attach(seq) == 8
    assert (pool.prefix_queries_tokens, pool.prefix_hits_tokens) == (9, 0)


def test_blank_blocks_go_before_cached_ones_and_ends_before_beginnings():
    pool = BlockPool(6, BLOCK)
    seq = make_seq(range(16))
    start(pool, seq)
    table = list(seq.block_table)
    stop(pool, seq)
    taker = make_seq(range(100, 130))
    pool.grow(taker, 2 * BLOCK)
    assert not set(taker.block_table) & set(table)
    for left in (3, 2, 1, 0):
        taker.num_computed_tokens = len(taker.block_table) * BLOCK
        pool.grow(taker, 1)
        assert taker.block_table[-1] == table[left]
        assert pool.cached_prefix(make_seq(range(17))).num_tokens == left * BLOCK
        pool.check_integrity([taker])


def test_least_recently_used_prefix_is_evicted_first():
    pool = BlockPool(3, BLOCK)
    old, new = make_seq(range(4)), make_seq(range(10, 14))
    start(pool, old)
    start(pool, new)
    stop(pool, old)
    stop(pool, new)
    again = make_seq(range(5))
    assert start(pool, again) == 4  # `old` is now the one used last
    stop(pool, again)
    pool.grow(make_seq(range(50, 58)), 8)
    assert pool.cached_prefix(make_seq(range(5))).num_tokens == 4
    assert pool.cached_prefix(make_seq(range(10, 15))).num_tokens == 0


def test_equal_blocks_computed_side_by_side_keep_the_first_entry():
    pool = BlockPool(16, BLOCK)
    first, second = make_seq(range(9)), make_seq(range(9))
    for seq in (first, second):
        assert pool.attach(seq) == 0
    for seq in (first, second):
        compute(pool, seq, 9)
    third = make_seq(range(9))
    pool.attach(third)
    assert third.block_table == first.block_table[:2]
    second.token_ids += [20, 21, 22]
    compute(pool, second, 3)
    turn = make_seq([*range(9), 20, 21, 22, 23])
    pool.attach(turn)
    assert turn.block_table == [*first.block_table[:2], second.block_table[2]]
    for seq in (first, second, third, turn):
        stop(pool, seq)
    pool.check_integrity([])
    assert pool.num_free_blocks == 16


def test_colliding_digests_are_never_a_wrong_hit(monkeypatch):
    monkeypatch.setattr(block_pool, "block_digest", lambda *_: b"same")
    pool = BlockPool(16, BLOCK)
    start(pool, make_seq(range(5)))
    assert pool.cached_prefix(make_seq(range(5))).num_tokens == 4
    assert pool.cached_prefix(make_seq(range(50, 55))).num_tokens == 0
    assert pool.cached_prefix(make_seq(range(5), salt="x")).num_tokens == 0


def test_child_of_a_colliding_parent_is_not_taken_for_a_child_of_its_successor(monkeypatch):
    """KV behind other tokens is other KV, even for equal tokens under an equal digest."""
    monkeypatch.setattr(
        block_pool, "block_digest", lambda parent, tokens, _: parent + bytes([tokens[0] // 100])
    )
    pool = BlockPool(16, BLOCK)
    child = [200, 201, 202, 203]
    start(pool, make_seq([1, 2, 3, 4, *child, 5]))
    start(pool, make_seq([9, 9, 9, 9, 5]))  # takes over its parent's digest
    assert pool.cached_prefix(make_seq([9, 9, 9, 9, *child, 5])).num_tokens == 4
    assert pool.cached_prefix(make_seq([1, 2, 3, 4, *child, 5])).num_tokens == 0


def test_digest_depends_on_parent_tokens_and_salt():
    digests = {
        block_digest(parent, tokens, salt)
        for parent in (b"", bytes(32))
        for tokens in ([1, 2], [2, 1], [1, 2**31])
        for salt in ("", "s", "\ud800")
    }
    assert len(digests) == 18


def test_releasable_blocks_are_those_nobody_shares():
    pool = BlockPool(16, BLOCK)
    first, second = make_seq(range(9)), make_seq([*range(8), 99])
    start(pool, first)
    start(pool, second)
    assert pool.num_releasable_blocks(first) == 1
    free = pool.num_free_blocks
    stop(pool, first)
    assert pool.num_free_blocks == free + 1
    assert pool.num_releasable_blocks(second) == 3


@pytest.mark.parametrize("live_prefix", [False, True])
def test_free_blocks_fall_by_what_a_batch_builder_assumes(live_prefix):
    pool = BlockPool(20, BLOCK)
    holder = make_seq(range(17))
    start(pool, holder)
    if not live_prefix:
        stop(pool, holder)
    seq = make_seq(range(30), arrival_s=1.0)
    running = [holder] if live_prefix else []
    view = PlannerView(waiting=[seq], running=running, memory=pool, token_budget=10, max_num_seqs=8)
    builder = BatchBuilder(view)
    num_tokens = builder.start(seq)
    assert num_tokens == 10
    seq.num_computed_tokens = pool.attach(seq)
    pool.grow(seq, num_tokens)
    assert pool.num_free_blocks == builder._free
    pool.check_integrity([*running, seq])


def test_preemption_frees_what_a_batch_builder_assumes():
    pool = BlockPool(6, BLOCK)
    first, last = make_seq(range(12)), make_seq([*range(8), 60, 61, 62], arrival_s=1.0)
    start(pool, first)
    start(pool, last)
    filler = make_seq(range(200, 208), arrival_s=0.5)
    start(pool, filler)
    view = PlannerView(
        waiting=[], running=[first, filler, last], memory=pool, token_budget=64, max_num_seqs=8
    )
    first.token_ids.append(1)
    builder = BatchBuilder(view)
    assert builder.schedule(first, 1) == 1
    assert builder.plan.preempt == [last.seq_id]
    stop(pool, last)
    pool.grow(first, 1)
    assert pool.num_free_blocks == builder._free == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _, seq: seq.block_table.pop(), "reference counts"),
        (lambda _, seq: seq.block_table.append(seq.block_table[0]), "holds a block twice"),
        (lambda _, seq: seq.block_table.append(99), "outside the pool"),
        (lambda pool, seq: pool._free.update({seq.block_table[0]: None}), "both free and in use"),
        (lambda pool, _: pool._free.popitem(), "leaked"),
        (lambda pool, _: pool._held.update({pool._free.popitem()[0]: HOLD}), "without a prefix"),
        (lambda pool, _: pool._held.update(dict.fromkeys(pool._free, HOLD)), "held and free to go"),
        (lambda pool, _: pool._held.update(dict.fromkeys(range(50, 55), HOLD)), "than may be"),
        (lambda pool, _: pool._holds.update(ghost=HOLD), "disagree"),
        (lambda pool, _: pool._free.update({77: None}), "free blocks outside"),
        (lambda pool, _: pool._index.popitem(), "the index lacks"),
        (lambda pool, _: pool._num_committed.update(ghost=1), "outlives"),
        (lambda pool, seq: pool._entry_of.__setitem__(seq.block_table[0], None), "disagree"),
        (lambda _, seq: seq.block_hashes.extend([b""] * 9), "not full"),
    ],
)
def test_integrity_check_finds_damage(damage, message):
    pool = BlockPool(8, BLOCK)
    seq = make_seq(range(9))
    start(pool, seq)
    pool.check_integrity([seq])
    damage(pool, seq)
    with pytest.raises(PoolCorruptedError, match=message):
        pool.check_integrity([seq])


def test_integrity_check_finds_a_blank_block_behind_a_cached_one():
    pool = BlockPool(4, BLOCK)
    seq = make_seq(range(4))
    start(pool, seq)
    stop(pool, seq)
    pool._free.move_to_end(next(iter(pool._free)))
    with pytest.raises(PoolCorruptedError, match="behind a cached one"):
        pool.check_integrity([])


def test_a_sequence_grows_into_the_blank_block_behind_its_last_one():
    pool = BlockPool(8, BLOCK)
    first, second, third = (make_seq(range(100)) for _ in range(3))
    pool.grow(first, BLOCK)
    pool.grow(second, BLOCK)
    pool.grow(third, 2 * BLOCK)
    pool.release(second)
    # Block 1 is the next to be handed out, but block 4 lies behind the third's.
    compute(pool, third, 2 * BLOCK)
    pool.grow(third, BLOCK)
    assert third.block_table == [2, 3, 4]
    pool.grow(first, 2 * BLOCK)
    assert first.block_table == [0, 1]


def test_a_cached_neighbour_is_left_to_those_who_may_hit_it():
    pool = BlockPool(4, BLOCK)
    old, new = make_seq(range(2 * BLOCK)), make_seq(range(50, 100))
    start(pool, old)
    stop(pool, old)
    pool.grow(new, 2 * BLOCK)
    assert new.block_table == [2, 3]
    pool.grow(new, 3 * BLOCK)  # nothing else is left
    assert new.block_table[2] in (0, 1)
