"""`BatchBuilder`: one iteration under construction.

It spends the token budget, the sequence slots and the KV blocks, so that a policy only says in
which order sequences are served.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from minserve.blocks import blocks_for
from minserve.planner.plan import CachedPrefix, IterationPlan, PlannerView, shared_blocks
from minserve.request import Sequence, SequenceState

# A start leaves this share of the pool free, so that the sequences that already
# run can grow for a while before anyone must be preempted.
WATERMARK = 0.01


class BatchBuilder:
    """Builds an `IterationPlan` from a view; it never changes a sequence.

    Invariants: tokens scheduled <= token budget; sequences <= max_num_seqs; blocks needed by what
    is scheduled and started <= free blocks + blocks of the preempted.

    Args:
        view: the engine's state.
        token_budget: the most tokens of the iteration; ``None`` takes the view's.
        order: the running sequences; the last one is preempted first. The default is by rank.
        num_kept: number of sequences at the front of the order that a start with ``evict`` may not
            preempt.
    """

    def __init__(
        self,
        view: PlannerView,
        token_budget: int | None = None,
        *,
        order: SequenceOf[Sequence] | None = None,
        num_kept: int = 0,
    ) -> None:
        self.view = view
        self._order = view.running if order is None else order
        self._num_kept = num_kept
        self.plan = IterationPlan()
        self.budget = view.token_budget if token_budget is None else token_budget
        self._free = view.memory.num_free_blocks
        self._block_size = view.memory.block_size
        self._preempted: set[str] = set()
        self._num_running = len(view.running)
        self._running_promises: int | None = None
        self._starting_promises = 0
        self._computed_by_siblings: set[str] | None = None

    def is_preempted(self, seq: Sequence) -> bool:
        return seq.seq_id in self._preempted

    def schedule(self, seq: Sequence, num_tokens: int, *, whole: bool = True) -> int:
        """Run up to ``num_tokens`` more tokens of a running sequence.

        It takes free blocks. If they do not suffice, it preempts running sequences that stand
        behind ``seq`` in the order and are not yet scheduled, the last one first.

        Args:
            whole: False to schedule fewer tokens, as many as blocks and budget allow, if not all
                fit.

        Returns:
            the number of tokens scheduled; 0 if the sequence does not run in this iteration.
        """
        # Asked for each sequence of each iteration, hence without calls where all is plain.
        scheduled = self.plan.num_scheduled_tokens
        if num_tokens > self.budget or len(scheduled) >= self.view.max_num_seqs:
            num_tokens = self._clip(num_tokens, whole)
            if num_tokens == 0:
                return 0
        end = seq.num_computed_tokens + num_tokens
        needed = max(0, blocks_for(end, self._block_size) - len(seq.block_table))
        while needed > self._free and self._preempt_one_behind(seq):
            pass
        if needed > self._free:
            if whole:
                return 0
            num_tokens = self._tokens_in(seq, self._free)
            if num_tokens <= 0:
                return 0
            needed = self._blocks_for(seq, num_tokens)
        scheduled[seq.seq_id] = num_tokens
        self.budget -= num_tokens
        self._free -= needed
        return num_tokens

    def schedule_all(self, decodes: SequenceOf[Sequence]) -> bool:
        """Run one token of each of these running decodes, where all fit as things are.

        The plan is the one that `schedule` would make of them one by one, and takes a fraction of
        the time.

        Returns:
            True if all are scheduled; otherwise none is, and some may still run.
        """
        scheduled = self.plan.num_scheduled_tokens
        if (
            self._preempted
            or len(decodes) > self.budget
            or len(scheduled) + len(decodes) > self.view.max_num_seqs
        ):
            return False
        size, needed = self._block_size, 0
        for seq in decodes:
            # Most have room for the token in the blocks that they hold.
            lacking = seq.num_computed_tokens + 1 - size * len(seq.block_table)
            if lacking > 0:
                needed += blocks_for(lacking, size)
        if needed > self._free:
            return False
        scheduled.update(dict.fromkeys([seq.seq_id for seq in decodes], 1))
        self.budget -= len(decodes)
        self._free -= needed
        return True

    def decodes(self) -> None:
        """Schedule all running decodes, then as many drafts for them as may be.

        The policies without a model of time use it: they speculate at a fixed length.
        """
        scheduled = [seq for seq in self.view.running if seq.is_decoding]
        if not self.schedule_all(scheduled):
            preempted = self._preempted
            scheduled = [
                seq for seq in scheduled if seq.seq_id not in preempted and self.schedule(seq, 1)
            ]
        proposer = self.view.speculation
        if proposer is not None:
            for seq in scheduled:
                left = seq.request.max_tokens - seq.num_output_tokens - 1
                self.speculate(seq, min(proposer.limit(seq), left))

    def speculate(self, seq: Sequence, num_tokens: int) -> int:
        """Have up to ``num_tokens`` drafted for a decode that is scheduled already.

        It takes what is left of the budget and of free blocks, and preempts no sequence for a
        guess.

        Returns:
            the number of tokens to be drafted.
        """
        spare = self._free - self._promised()
        room = (len(seq.block_table) + self._new_blocks(seq) + max(0, spare)) * self._block_size
        room -= seq.num_computed_tokens + self.plan.num_scheduled_tokens[seq.seq_id]
        num_tokens = min(num_tokens, self.budget, room)
        if num_tokens <= 0:
            return 0
        before = self._new_blocks(seq)
        self.plan.num_scheduled_tokens[seq.seq_id] += num_tokens
        self.plan.speculation[seq.seq_id] = num_tokens
        self.budget -= num_tokens
        self._free -= self._new_blocks(seq) - before
        return num_tokens

    def start(
        self,
        seq: Sequence,
        *,
        whole: bool = False,
        most: int | None = None,
        evict: bool = False,
        hit: CachedPrefix | None = None,
    ) -> int:
        """Start a waiting sequence with its first chunk.

        It starts only if all of its known tokens fit beside what running prefills still need, and
        not while another output of its request computes a prompt that the two can share.

        Args:
            whole: True to run all of its tokens at once, or none.
            most: the most tokens of the first chunk, beside the budget.
            evict: True to preempt sequences that are not kept to make room. Otherwise no sequence
                is preempted for it, and it starts only if none has been preempted in this
                iteration.
            hit: its cached prefix, if that has been looked up already.

        Returns:
            the number of tokens scheduled; 0 if it stays waiting.
        """
        if self.budget <= 0 or (self._preempted and not evict) or self.awaits_sibling(seq):
            return 0
        if hit is None:
            hit = self.view.memory.cached_prefix(seq)
        remaining = seq.num_tokens - hit.num_tokens
        num_tokens = self._clip(remaining if most is None else min(remaining, most), whole)
        if num_tokens <= 0:
            return 0
        total = self._blocks_of(seq.num_tokens) - hit.num_tokens // self.view.memory.block_size
        total += hit.num_idle_blocks
        if not (self._has_room(total) or (evict and self._evict_for(total))):
            return 0
        first = self._first_chunk_blocks(num_tokens, hit)
        self.plan.start.append(seq.seq_id)
        if seq.request.params.n > 1 and hit.num_tokens < self._shared_tokens(seq):
            self._prompts_under_way().add(seq.request.request_id)
        self._num_running += 1
        self._starting_promises += total - first
        self.plan.num_scheduled_tokens[seq.seq_id] = num_tokens
        self.budget -= num_tokens
        self._free -= first
        return num_tokens

    def awaits_sibling(self, seq: Sequence) -> bool:
        """Return True if a waiting sequence should begin only after another output of its request
        has computed their prompt. If they began together, both would compute and hold it.
        """
        return (
            seq.request.params.n > 1
            and seq.state is SequenceState.WAITING
            and seq.num_output_tokens == 0
            and seq.request.request_id in self._prompts_under_way()
        )

    def _prompts_under_way(self) -> set[str]:
        """Return the ids of requests with several outputs, one of which computes the prompt now."""
        if self._computed_by_siblings is None:
            self._computed_by_siblings = {
                seq.request.request_id
                for seq in self.view.running
                if seq.request.params.n > 1 and seq.num_computed_tokens < self._shared_tokens(seq)
            }
        return self._computed_by_siblings

    def _shared_tokens(self, seq: Sequence) -> int:
        return shared_blocks(seq, self.view.memory) * self._block_size

    def _has_room(self, num_blocks: int) -> bool:
        """Return True if one more sequence with that many blocks can run."""
        spare = self._free - self._promised() - self._watermark()
        return self._num_running < self.view.max_num_seqs and num_blocks <= spare

    def _evict_for(self, num_blocks: int) -> bool:
        """Preempt sequences that are not kept until there is room; none if that is not enough."""
        victims = [
            seq
            for seq in self._order[self._num_kept :]
            if not self.is_preempted(seq) and seq.seq_id not in self.plan.num_scheduled_tokens
        ]
        gain = sum(self.view.memory.num_releasable_blocks(seq) for seq in victims)
        spare = self._free - self._promised() - self._watermark()
        if not victims or num_blocks > spare + gain:
            return False
        while victims and not self._has_room(num_blocks):
            self._preempt(victims.pop())
        return self._has_room(num_blocks)

    def _watermark(self) -> int:
        """Return how many blocks a start leaves free; 0 if nothing runs: a lone request always
        starts.
        """
        return int(self.view.memory.num_blocks * WATERMARK) if self._num_running else 0

    def _clip(self, num_tokens: int, whole: bool) -> int:
        if len(self.plan.num_scheduled_tokens) >= self.view.max_num_seqs:
            return 0
        if num_tokens <= self.budget:
            return num_tokens
        return 0 if whole else max(self.budget, 0)

    def _blocks_of(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self._block_size)

    def _new_blocks(self, seq: Sequence) -> int:
        """Return how many blocks a running sequence needs for what is scheduled of it."""
        return self._blocks_for(seq, self.plan.num_scheduled_tokens.get(seq.seq_id, 0))

    def _blocks_for(self, seq: Sequence, num_tokens: int) -> int:
        end = seq.num_computed_tokens + num_tokens
        needed = blocks_for(end, self._block_size) - len(seq.block_table)
        return needed if needed > 0 else 0

    def _tokens_in(self, seq: Sequence, num_free: int) -> int:
        room = (len(seq.block_table) + num_free) * self.view.memory.block_size
        return min(room - seq.num_computed_tokens, self.budget, seq.num_uncomputed_tokens)

    def _first_chunk_blocks(self, num_tokens: int, hit: CachedPrefix) -> int:
        own = self._blocks_of(hit.num_tokens + num_tokens)
        return own - hit.num_tokens // self.view.memory.block_size + hit.num_idle_blocks

    def _promised(self) -> int:
        """Return how many blocks prefills under way will still need for tokens that they already
        have.
        """
        if self._running_promises is None:
            self._running_promises, size = 0, self._block_size
            for seq in self.view.running:
                lacks = blocks_for(len(seq.token_ids), size) - len(seq.block_table)
                if lacks > 0 and not self.is_preempted(seq):
                    self._running_promises += max(0, lacks - self._new_blocks(seq))
        return self._running_promises + self._starting_promises

    def _preempt_one_behind(self, seq: Sequence) -> bool:
        for victim in reversed(self._order):
            if victim is seq:
                return False
            if self.is_preempted(victim) or victim.seq_id in self.plan.num_scheduled_tokens:
                continue
            self._preempt(victim)
            return True
        return False

    def _preempt(self, victim: Sequence) -> None:
        self._preempted.add(victim.seq_id)
        self.plan.preempt.append(victim.seq_id)
        self._num_running -= 1
        self._free += self.view.memory.num_releasable_blocks(victim)
        self._running_promises = None
