"""Random lives of sequences in a block pool, against a model of what its blocks hold."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_sequences import make_seq

from minserve.engine import block_pool
from minserve.engine.block_pool import BlockPool, HoldWish
from minserve.errors import OutOfBlocksError
from minserve.request import Sequence


class PoolMachine(RuleBasedStateMachine):
    """Random lives of sequences. The truth: which tokens' KV each block holds.

    `kv` maps a block to the (salt and) tokens its slots were computed from, whole prefix
    included; it is written when tokens are computed, as a real cache would be.
    """

    tiny_digests = False

    @initialize(num_blocks=st.integers(3, 24), block_size=st.integers(1, 4))
    def build(self, num_blocks, block_size):
        self.original = block_pool.block_digest
        if self.tiny_digests:
            block_pool.block_digest = lambda *parts: (
                hashlib.sha256(self.original(*parts))
                .digest()[:1]
                .translate(bytes(i % 3 for i in range(256)))
            )
        self.pool = BlockPool(num_blocks, block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.kv: dict[tuple[int, int], tuple] = {}
        self.now = 0.0

    def teardown(self):
        if hasattr(self, "original"):
            for seq in self.running:
                self.pool.release(seq)
            self.pool.check_integrity([])
            assert self.pool.num_free_blocks == self.pool.num_blocks
            block_pool.block_digest = self.original

    # Two token values make equal prefixes likely without arranging them.
    @precondition(lambda self: len(self.waiting) < 6)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from("ab"))
    def arrive(self, tokens, salt):
        self.waiting.append(make_seq(tokens, salt=salt))

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data(), keep=st.integers(0, 20), salt=st.sampled_from("ab"))
    def arrive_with_a_known_beginning(self, data, keep, salt):
        model = data.draw(st.sampled_from(self.waiting + self.running))
        self.waiting.append(make_seq([*model.token_ids[:keep], 1], salt=salt))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def attach(self, data):
        seq = data.draw(st.sampled_from(self.waiting))
        free, hit = self.pool.num_free_blocks, self.pool.cached_prefix(seq)
        cached = self.pool.attach(seq)
        assert cached == hit.num_tokens < seq.num_tokens
        assert self.pool.num_free_blocks == free - hit.num_idle_blocks
        seq.num_computed_tokens = cached
        self.waiting.remove(seq)
        self.running.append(seq)
        self.assert_kv_is_right(seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 12), commit=st.booleans())
    def compute(self, data, num_tokens, commit):
        seq = data.draw(st.sampled_from(self.running))
        while seq.num_uncomputed_tokens < num_tokens:
            seq.token_ids.append(num_tokens % 2)
        free, table = self.pool.num_free_blocks, list(seq.block_table)
        end = seq.num_computed_tokens + num_tokens
        needed = max(0, -(-end // self.pool.block_size) - len(table))
        if needed > free:
            with pytest.raises(OutOfBlocksError):
                self.pool.grow(seq, num_tokens)
            assert seq.block_table == table
            assert self.pool.num_free_blocks == free
            return
        self.pool.grow(seq, num_tokens)
        assert self.pool.num_free_blocks == free - needed
        for position in range(seq.num_computed_tokens, end):
            self.kv[self.slot(seq, position)] = self.truth(seq, position)
        seq.num_computed_tokens = end
        if commit:
            self.pool.commit(seq)
        self.assert_kv_is_right(seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), finish=st.booleans(), held_s=st.sampled_from([None, 0.0, 1.0, 3.0]))
    def release(self, data, finish, held_s):
        seq = data.draw(st.sampled_from(self.running))
        free, releasable = self.pool.num_free_blocks, self.pool.num_releasable_blocks(seq)
        until = self.now + held_s if held_s else None
        wish = None if held_s is None else HoldWish(seq.request.cache_salt, until)
        self.pool.release(seq, wish)
        assert self.pool.num_free_blocks == free + releasable
        seq.num_computed_tokens = 0
        self.running.remove(seq)
        if not finish:
            self.waiting.append(seq)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def let_time_pass(self, seconds):
        self.now += seconds
        free = self.pool.num_free_blocks
        self.pool.end_holds(self.now)
        assert self.pool.num_free_blocks == free

    @invariant()
    def books_add_up(self):
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.running)

    @invariant()
    def running_kv_is_untouched(self):
        for seq in getattr(self, "running", []):
            self.assert_kv_is_right(seq)

    def slot(self, seq, position):
        block = seq.block_table[position // self.pool.block_size]
        return block, position % self.pool.block_size

    def truth(self, seq, position):
        return seq.request.cache_salt, tuple(seq.token_ids[: position + 1])

    def assert_kv_is_right(self, seq):
        for position in range(seq.num_computed_tokens):
            assert self.kv[self.slot(seq, position)] == self.truth(seq, position)


class CollidingPoolMachine(PoolMachine):
    """The same with digests of three values, so that nearly every look-up collides."""

    tiny_digests = True


_STEPS = settings(max_examples=60, stateful_step_count=60, derandomize=True)
TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = _STEPS
TestCollidingPoolMachine = CollidingPoolMachine.TestCase
TestCollidingPoolMachine.settings = _STEPS
