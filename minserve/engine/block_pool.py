"""`BlockPool` keeps account of who uses which KV block. To it a block is a number, no tensor.

A block is in use (one or more block tables name it) or free. A free block that
still holds an indexed prefix is free all the same: it stays findable until it is
handed out again::

    blank ──grow──► in use ──commit──► in use, indexed ──release──► idle, indexed
      ▲               │                         ▲                        │  │
      └───release─────┘                         └────────attach──────────┘  │
      └───────────────────────── grow (evicts the entry) ───────────────────┘

Idle blocks may be held until a time: they are free as all idle ones are, so that no promise
depends on them, but are evicted behind all others. So the newest prefix of an agent's task stays
findable while its tool runs. At most `HELD_SHARE` of the blocks are held.

The prefix index follows vLLM's automatic prefix caching: a block full of tokens is
named by SHA-256 over (its parent's name, its tokens, the cache salt).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from minserve.blocks import blocks_for
from minserve.errors import OutOfBlocksError, PoolCorruptedError
from minserve.planner.plan import CachedPrefix
from minserve.request import Sequence

_ROOT_SERIAL = 0
# The largest share of the blocks that is held for tasks. Another one is left to what all share.
HELD_SHARE = 0.5


def block_digest(parent: bytes, token_ids: list[int], cache_salt: str) -> bytes:
    """Return the name of a full block: SHA-256 of its parent's name, its tokens and the salt.

    Args:
        parent: digest of the block before it; empty for the first one.
    """
    # Parent and tokens have fixed lengths within a pool, so the fields cannot run into
    # each other: only the salt, at the end, varies.
    digest = hashlib.sha256(parent)
    digest.update(array("q", token_ids).tobytes())
    digest.update(cache_salt.encode("utf-8", "surrogatepass"))
    return digest.digest()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One indexed block.

    Digests find an entry, the other fields prove it: tokens and salt are compared, and
    the parent's serial (never given twice) shows that the KV was computed behind
    exactly the chain that led here, even if the parent's digest collides with another.
    """

    block: int
    digest: bytes
    serial: int
    parent_serial: int
    token_ids: list[int]
    cache_salt: str


class HoldWish(NamedTuple):
    """The wish to hold a sequence's blocks in place of those that were held for its owner before.

    Attributes:
        owner: for whom, such as a task.
        until: the time at which the hold ends; ``None`` holds nothing more for the owner.
    """

    owner: Hashable
    until: float | None


@dataclass(slots=True, eq=False)
class _Hold:
    """A hold: its blocks, and how many of them are still held."""

    owner: Hashable
    until: float
    blocks: list[int]
    num_held: int = 0


class BlockPool:
    """Hands out KV blocks, shares those with equal prefixes, and counts references.

    A sequence belongs to one pool: its ``block_hashes`` are memoized for this block
    size. Sequence ids are unique among the sequences that hold blocks.

    Attributes:
        num_blocks: size of the pool.
        block_size: tokens per block.
        prefix_caching: False keeps no index, so that nothing is ever shared.
        prefix_queries_tokens: tokens of all sequences that may take a hit, at their first start.
        prefix_hits_tokens: tokens of these that the index held.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self._refs = [0] * num_blocks
        # Next to be handed out first: blank blocks, then idle indexed ones by last use.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        # Idle indexed blocks that are handed out last, with their hold; the oldest hold first.
        self._held: OrderedDict[int, _Hold] = OrderedDict()
        self._holds: dict[Hashable, _Hold] = {}
        self._most_held = int(HELD_SHARE * num_blocks)
        # No hold ends before this time.
        self._next_end_s = math.inf
        self._index: dict[bytes, _Entry] = {}
        self._entry_of: list[_Entry | None] = [None] * num_blocks
        self._last_serial = _ROOT_SERIAL
        # Leading blocks of each sequence that `commit` is done with.
        self._num_committed: dict[str, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now (evictable cached ones included)."""
        return len(self._free) + len(self._held)

    @property
    def num_held_blocks(self) -> int:
        """Of the free blocks, those that are kept for tasks as long as others are free."""
        return len(self._held)

    @property
    def num_blank_blocks(self) -> int:
        """Blocks that can be handed out without evicting a cached prefix."""
        return sum(1 for _ in takewhile(lambda block: self._entry_of[block] is None, self._free))

    def num_releasable_blocks(self, seq: Sequence) -> int:
        """Return the number of blocks that only ``seq`` uses, so that its release frees them."""
        return sum(self._refs[block] == 1 for block in seq.block_table)

    def may_hit(self, seq: Sequence) -> bool:
        """Return whether a sequence begins with the blocks that are cached of its tokens."""
        # Log probabilities of the prompt need its forward pass.
        return self.prefix_caching and seq.request.params.prompt_logprobs is None

    def cached_prefix(self, seq: Sequence) -> CachedPrefix:
        """Return the longest cached prefix of ``seq``: whole blocks, without the last token.

        This changes nothing but the memo of digests in ``seq.block_hashes``.
        """
        num_blocks = num_idle = 0
        for entry in self._matches(seq):
            num_blocks += 1
            num_idle += self._refs[entry.block] == 0
        return CachedPrefix(num_blocks * self.block_size, num_idle)

    def attach(self, seq: Sequence) -> int:
        """Give a sequence without blocks the cached blocks that it begins with.

        This takes as many free blocks as ``cached_prefix`` says are idle. Blocks for the
        other tokens come from `grow`.

        Returns:
            The number of tokens whose KV the sequence now has; the caller sets
            ``num_computed_tokens``.
        """
        assert not seq.block_table, f"{seq!r} already holds blocks"
        if not self.may_hit(seq):
            return 0
        for entry in self._matches(seq):
            self._acquire(entry.block)
            seq.block_table.append(entry.block)
        num_tokens = len(seq.block_table) * self.block_size
        if seq.block_table:
            self._num_committed[seq.seq_id] = len(seq.block_table)
        # What a preempted sequence finds of itself saves nothing that others had computed.
        if seq.num_preemptions == 0:
            self.prefix_queries_tokens += seq.num_tokens
            self.prefix_hits_tokens += num_tokens
        return num_tokens

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Make room for the KV of ``num_tokens`` tokens after the computed ones.

        Raises:
            OutOfBlocksError: where too few blocks are free; nothing has changed then.
        """
        end = seq.num_computed_tokens + num_tokens
        needed = blocks_for(end, self.block_size) - len(seq.block_table)
        if needed <= 0:
            return
        if needed > self.num_free_blocks:
            raise OutOfBlocksError(
                f"{seq.seq_id} needs {needed} more KV blocks, {self.num_free_blocks} of "
                f"{self.num_blocks} are free"
            )
        for _ in range(needed):
            block = self._next_free(behind=seq.block_table[-1] if seq.block_table else None)
            self._forget(block)
            self._acquire(block)
            seq.block_table.append(block)

    def commit(self, seq: Sequence) -> None:
        """Index the blocks of ``seq`` that its computed tokens have filled.

        Where an equal block is indexed already, that one stays and the sequence keeps
        its own copy unindexed, so that a block table never changes under a running batch.
        """
        if not self.prefix_caching:
            return
        num_full = min(seq.num_computed_tokens // self.block_size, len(seq.block_table))
        if num_full <= self._num_committed.get(seq.seq_id, 0):
            return
        # The nearest own block in the index ends a chain that is known to be right.
        # Without one (all copies so far) the chain is followed from the start.
        start = num_full
        while start > 0 and self._entry_of[seq.block_table[start - 1]] is None:
            start -= 1
        nearest = self._entry_of[seq.block_table[start - 1]] if start > 0 else None
        serial = nearest.serial if nearest is not None else _ROOT_SERIAL
        for position in range(start, num_full):
            entry = self._lookup(seq, position, serial)
            serial = (entry or self._insert(seq, position, serial)).serial
        self._num_committed[seq.seq_id] = num_full

    def trim(self, seq: Sequence) -> None:
        """Take back the blocks behind the computed tokens, which were grown for rejected drafts."""
        needed = blocks_for(seq.num_computed_tokens, self.block_size)
        while len(seq.block_table) > needed:
            self._drop(seq.block_table.pop())

    def release(self, seq: Sequence, wish: HoldWish | None = None) -> None:
        """Take all blocks from ``seq``; indexed ones stay findable until they are needed.

        Its last blocks are evicted before its first ones, since more prompts share a
        beginning than an end.

        Args:
            wish: to hold those that become idle.
        """
        table = seq.block_table
        for block in reversed(table):
            self._drop(block)
        if wish is not None:
            self._hold(table, wish)
        table.clear()
        self._num_committed.pop(seq.seq_id, None)

    def end_holds(self, now: float) -> None:
        """End the holds whose time is over: these blocks are evicted like any other."""
        if now < self._next_end_s:
            return
        for hold in [hold for hold in self._holds.values() if hold.until <= now]:
            self._end_hold(hold)
        self._next_end_s = min((hold.until for hold in self._holds.values()), default=math.inf)

    def forget(self, seq: Sequence) -> None:
        """Let no other sequence find the blocks of ``seq``, whose KV may be wrong."""
        for block in seq.block_table:
            self._forget(block)

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Check every invariant of the pool against all sequences that hold blocks.

        This takes time in proportion to the pool, so it is for idle moments and tests.

        Raises:
            PoolCorruptedError: naming the first invariant found broken.
        """
        live = list(live)
        self._check_tables(live)
        self._check_free_list()
        self._check_index()
        holders = {seq.seq_id for seq in live if seq.block_table}
        _require(self._num_committed.keys() <= holders, "a commit count outlives its sequence")

    def _matches(self, seq: Sequence) -> Iterator[_Entry]:
        """Return the index entries of the longest cached prefix, first block first."""
        if not self.may_hit(seq):
            return
        parent_serial = _ROOT_SERIAL
        for position in range((seq.num_tokens - 1) // self.block_size):
            entry = self._lookup(seq, position, parent_serial)
            if entry is None:
                return
            parent_serial = entry.serial
            yield entry

    def _lookup(self, seq: Sequence, position: int, parent_serial: int) -> _Entry | None:
        """Return the entry that equals the full block at ``position`` behind that parent."""
        hashes, start = seq.block_hashes, position * self.block_size
        digest = hashes[position] if position < len(hashes) else self._digest(seq, position)
        entry = self._index.get(digest)
        if (
            entry is not None
            and entry.parent_serial == parent_serial
            and entry.token_ids == seq.token_ids[start : start + self.block_size]
            and entry.cache_salt == seq.request.cache_salt
        ):
            return entry
        return None

    def _insert(self, seq: Sequence, position: int, parent_serial: int) -> _Entry:
        """Index the sequence's own block at ``position`` behind that parent."""
        block, digest = seq.block_table[position], self._digest(seq, position)
        # An unequal entry of this digest is a collision, or its parent was evicted and
        # computed anew, which leaves it out of reach: the newcomer is worth more.
        stale = self._index.get(digest)
        if stale is not None:
            self._forget(stale.block)
        self._last_serial += 1
        entry = _Entry(
            block=block,
            digest=digest,
            serial=self._last_serial,
            parent_serial=parent_serial,
            token_ids=self._block_tokens(seq, position),
            cache_salt=seq.request.cache_salt,
        )
        self._index[digest] = self._entry_of[block] = entry
        return entry

    def _forget(self, block: int) -> None:
        """Take a block out of the index, if it is there."""
        entry = self._entry_of[block]
        if entry is not None:
            del self._index[entry.digest]
            self._entry_of[block] = None
            if self._refs[block] == 0:
                if block in self._held:
                    self._let_go(block)
                self._free.move_to_end(block, last=False)

    def _hold(self, table: list[int], wish: HoldWish) -> None:
        """Hold those blocks of a table that are idle; the oldest holds end where there are too many.

        A sequence's first blocks are held longest, as they are evicted last.
        """
        before = self._holds.get(wish.owner)
        if before is not None:
            self._end_hold(before)
        if wish.until is None:
            return
        blocks = [
            block
            for block in reversed(table[: self._most_held])
            if self._refs[block] == 0 and self._entry_of[block] is not None
        ]
        if not blocks:
            return
        hold = self._holds[wish.owner] = _Hold(wish.owner, wish.until, blocks, len(blocks))
        for block in blocks:
            if block in self._held:
                self._unhold(block)
            else:
                del self._free[block]
            self._held[block] = hold
        self._next_end_s = min(self._next_end_s, wish.until)
        while len(self._held) > self._most_held:
            self._let_go(next(iter(self._held)))

    def _end_hold(self, hold: _Hold) -> None:
        for block in hold.blocks:
            if self._held.get(block) is hold:
                self._let_go(block)

    def _let_go(self, block: int) -> None:
        """End the hold of one block, which counts as used just now."""
        self._unhold(block)
        self._free[block] = None

    def _unhold(self, block: int) -> None:
        hold = self._held.pop(block)
        hold.num_held -= 1
        if not hold.num_held:
            del self._holds[hold.owner]

    def _drop(self, block: int) -> None:
        """Take one user off a block; the last one frees it."""
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free[block] = None
            if self._entry_of[block] is None:
                self._free.move_to_end(block, last=False)

    def _next_free(self, behind: int | None) -> int:
        """Return the free block to hand out next.

        It is the neighbour behind a given block, where that is blank: a sequence whose blocks
        lie side by side is read without being gathered.
        """
        if behind is not None and behind + 1 in self._free and self._entry_of[behind + 1] is None:
            return behind + 1
        return next(iter(self._free or self._held))

    def _acquire(self, block: int) -> None:
        if self._held and block in self._held:
            self._unhold(block)
        else:
            self._free.pop(block, None)
        self._refs[block] += 1

    def _block_tokens(self, seq: Sequence, position: int) -> list[int]:
        start = position * self.block_size
        return seq.token_ids[start : start + self.block_size]

    def _digest(self, seq: Sequence, position: int) -> bytes:
        """Return the digest of the full block at ``position``; it is computed once."""
        hashes = seq.block_hashes
        while len(hashes) <= position:
            parent = hashes[-1] if hashes else b""
            tokens = self._block_tokens(seq, len(hashes))
            hashes.append(block_digest(parent, tokens, seq.request.cache_salt))
        return hashes[position]

    def _check_tables(self, live: list[Sequence]) -> None:
        uses = [0] * self.num_blocks
        for seq in live:
            table = seq.block_table
            _require(len(set(table)) == len(table), f"{seq.seq_id} holds a block twice: {table}")
            _require(
                self._are_inside(table), f"{seq.seq_id} holds a block outside the pool: {table}"
            )
            _require(
                len(seq.block_hashes) <= seq.num_tokens // self.block_size,
                f"{seq.seq_id} has a digest of a block that is not full",
            )
            for block in table:
                uses[block] += 1
        wrong = [block for block, refs in enumerate(self._refs) if refs != uses[block]]
        _require(not wrong, f"reference counts and block tables disagree on blocks {wrong}")

    def _check_free_list(self) -> None:
        unused = {block for block, refs in enumerate(self._refs) if refs == 0}
        twice = sorted(self._free.keys() & self._held.keys())
        _require(not twice, f"blocks both held and free to go: {twice}")
        _require(len(self._held) <= self._most_held, "more blocks are held than may be")
        blank = [block for block in self._held if self._entry_of[block] is None]
        _require(not blank, f"held blocks without a prefix: {blank}")
        counts = Counter(self._held.values())
        kept = {hold: hold.num_held for hold in self._holds.values()}
        _require(counts == kept, "holds and held blocks disagree")
        free = self._free.keys() | self._held.keys()
        leaked, wrong = unused - free, sorted(free - unused)
        both = [block for block in wrong if self._are_inside([block])]
        _require(not both, f"blocks both free and in use: {both}")
        _require(not leaked, f"leaked blocks, neither free nor in use: {sorted(leaked)}")
        _require(not wrong, f"free blocks outside the pool: {wrong}")
        entries = [self._entry_of[block] for block in self._free]
        _require(
            None not in entries[entries.count(None) :], "a blank block waits behind a cached one"
        )

    def _are_inside(self, blocks: Collection[int]) -> bool:
        """Return whether all blocks are blocks of the pool."""
        return not blocks or (min(blocks) >= 0 and max(blocks) < self.num_blocks)

    def _check_index(self) -> None:
        wrong = [
            entry.block
            for digest, entry in self._index.items()
            if entry.digest != digest
            or self._entry_of[entry.block] is not entry
            or len(entry.token_ids) != self.block_size
        ]
        _require(not wrong, f"index and blocks disagree on blocks {wrong}")
        num_entries = self.num_blocks - self._entry_of.count(None)
        _require(num_entries == len(self._index), "a block has an entry that the index lacks")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PoolCorruptedError(f"block pool: {message}")
