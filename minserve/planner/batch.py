"""`BatchDraft`: one iteration under construction.

Spends the token budget, the sequence slots and the KV blocks, so that each policy
only says in which order sequences are served.
"""

from __future__ import annotations

from minserve.planner.plan import CachedPrefix, IterationPlan, PlannerView
from minserve.request import Sequence

# An admission leaves this share of the pool free, so that the sequences that already
# run can grow for a while before anyone must be preempted.
WATERMARK = 0.01


class BatchDraft:
    """Builds an `IterationPlan` from a view; never touches a sequence.

    Invariants: tokens scheduled <= token budget; sequences <= max_num_seqs; blocks
    needed by what is scheduled and admitted <= free blocks + blocks of the preempted.
    """

    def __init__(self, view: PlannerView, token_budget: int | None = None) -> None:
        self.view = view
        self.plan = IterationPlan()
        self.budget = view.token_budget if token_budget is None else token_budget
        self._free = view.memory.num_free_blocks
        self._preempted: set[str] = set()
        self._num_running = len(view.running)
        self._blocks_promised: int | None = None

    def is_preempted(self, seq: Sequence) -> bool:
        return seq.seq_id in self._preempted

    def schedule(self, seq: Sequence, num_tokens: int, *, whole: bool = True) -> int:
        """Run up to ``num_tokens`` more tokens of a running sequence.

        Takes free blocks; where they do not suffice, preempts running sequences that
        rank behind ``seq`` and are not yet scheduled, last first. With ``whole=False``
        fewer tokens may be scheduled, as many as blocks and budget allow.

        Returns:
            tokens scheduled; 0 where the sequence has to sit this iteration out.
        """
        num_tokens = self._clip(num_tokens, whole)
        if num_tokens == 0:
            return 0
        needed = self._blocks_for(seq, num_tokens)
        while needed > self._free and self._preempt_one_behind(seq):
            pass
        if needed > self._free:
            if whole:
                return 0
            num_tokens = self._tokens_in(seq, self._free)
            if num_tokens <= 0:
                return 0
            needed = self._blocks_for(seq, num_tokens)
        self._take(seq, num_tokens, needed)
        return num_tokens

    def admit(self, seq: Sequence, *, whole: bool = False) -> int:
        """Start a waiting sequence with its first chunk.

        Admits only if all of its known tokens fit beside what running prefills still
        need, and only while nobody is being preempted. Nobody is preempted for it.

        Returns:
            tokens scheduled; 0 where it stays waiting.
        """
        if self._preempted or self._num_running >= self.view.max_num_seqs or self.budget <= 0:
            return 0
        hit = self.view.memory.cached_prefix(seq)
        remaining = seq.num_tokens - hit.num_tokens
        num_tokens = self._clip(remaining, whole)
        if num_tokens == 0:
            return 0
        total = self._blocks_of(seq.num_tokens) - hit.num_tokens // self.view.memory.block_size
        total += hit.num_idle_blocks
        spare = self._free - self._promised() - self._watermark()
        if total > spare:
            return 0
        first = self._first_chunk_blocks(num_tokens, hit)
        self.plan.admit.append(seq.seq_id)
        self._num_running += 1
        self._blocks_promised = self._promised() + total - first
        self._take(seq, num_tokens, first)
        return num_tokens

    def _watermark(self) -> int:
        """Blocks to leave free; none when nothing runs, so that a lone request always starts."""
        return int(self.view.memory.num_blocks * WATERMARK) if self._num_running else 0

    def _clip(self, num_tokens: int, whole: bool) -> int:
        if len(self.plan.num_scheduled_tokens) >= self.view.max_num_seqs:
            return 0
        if num_tokens <= self.budget:
            return num_tokens
        return 0 if whole else max(self.budget, 0)

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.view.memory.block_size)

    def _blocks_for(self, seq: Sequence, num_tokens: int) -> int:
        end = seq.num_computed_tokens + num_tokens
        return max(0, self._blocks_of(end) - len(seq.block_table))

    def _tokens_in(self, seq: Sequence, num_free: int) -> int:
        room = (len(seq.block_table) + num_free) * self.view.memory.block_size
        return min(room - seq.num_computed_tokens, self.budget, seq.num_uncomputed_tokens)

    def _first_chunk_blocks(self, num_tokens: int, hit: CachedPrefix) -> int:
        own = self._blocks_of(hit.num_tokens + num_tokens)
        return own - hit.num_tokens // self.view.memory.block_size + hit.num_idle_blocks

    def _promised(self) -> int:
        """Blocks that running prefills will still need for tokens they already have."""
        if self._blocks_promised is None:
            self._blocks_promised = sum(
                max(0, self._blocks_of(s.num_tokens) - len(s.block_table))
                - self._blocks_for(s, self.plan.num_scheduled_tokens.get(s.seq_id, 0))
                for s in self.view.running
                if not self.is_preempted(s)
            )
        return self._blocks_promised

    def _take(self, seq: Sequence, num_tokens: int, num_blocks: int) -> None:
        self.plan.num_scheduled_tokens[seq.seq_id] = num_tokens
        self.budget -= num_tokens
        self._free -= num_blocks

    def _preempt_one_behind(self, seq: Sequence) -> bool:
        for victim in reversed(self.view.running):
            if victim.rank <= seq.rank:
                return False
            if self.is_preempted(victim) or victim.seq_id in self.plan.num_scheduled_tokens:
                continue
            self._preempted.add(victim.seq_id)
            self.plan.preempt.append(victim.seq_id)
            self._num_running -= 1
            self._free += self.view.memory.num_releasable_blocks(victim)
            return True
        return False
