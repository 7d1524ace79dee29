"""`DraftModelProposer` drafts with a small model of the same vocabulary, for all sequences at once.

The draft model's KV lies beside the target's: a KV block holds both for its tokens, so that
one block table and one pool account for both. It is computed lazily: tokens of a sequence that
have no draft KV yet, from its prompt or from iterations without speculation, are run when it
speculates next.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.paged_model import PagedModel
from minserve.engine.sampling.distribution import INVALID
from minserve.engine.sampling.rehearsal import rehearse_drafts
from minserve.engine.sampling.rows import SamplingRow
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.proposal import Proposal
from minserve.engine.speculation.proposer import DraftRequest, Proposer
from minserve.planner.predict.eager import DraftPasses
from minserve.request import Sequence

# Up to so many tokens of a sequence count as a decode for the attention backend.
MOST_DECODE_TOKENS = 2


class DraftModelProposer(Proposer):
    """Drafts with a model.

    Args:
        model: the draft model with its KV cache, whose blocks are those of the target's.
        head_token_ids: int64 ``[head]``: the tokens that its logits stand for, where its
            head is trimmed to some of the vocabulary; ``None`` for all.
        vocab_size: that of the target.
    """

    name = "draft"

    def __init__(
        self,
        max_tokens: int,
        model: PagedModel,
        vocab_size: int,
        head_token_ids: Tensor | None = None,
    ) -> None:
        super().__init__(max_tokens)
        self.model = model
        self._vocab_size = vocab_size
        self._head = head_token_ids
        # A copy on the host, where the chosen tokens are.
        self._head_ids = None if head_token_ids is None else head_token_ids.tolist()
        self._sampler = Sampler(fused=model.backend.in_triton)
        # Per sequence, tokens whose draft KV was written.
        self._num_written: dict[str, int] = {}
        # Per block, the digest of the tokens whose draft KV fills it.
        self._digests: dict[int, bytes] = {}

    @property
    def passes(self) -> DraftPasses:
        graphs = self.model.graphs
        return DraftPasses(None if graphs is None else graphs.mixed, MOST_DECODE_TOKENS)

    def limit(self, seq: Sequence) -> int:
        # The last drafted token needs no draft KV, so its position alone must exist.
        return max(0, min(self.max_tokens, self.model.model.shape.max_positions - seq.num_tokens))

    def lag(self, seq: Sequence) -> int:
        return seq.num_tokens - 1 - self._num_computed(seq)

    def roll_back(self, seq: Sequence) -> None:
        written = self._num_written.get(seq.seq_id, 0)
        if written > seq.num_computed_tokens:
            self._num_written[seq.seq_id] = seq.num_computed_tokens

    def forget(self, seq: Sequence) -> None:
        self._num_written.pop(seq.seq_id, None)

    @torch.inference_mode()
    def rehearse(self, num_seqs: int) -> None:
        vocab = self._vocab_size if self._head is None else len(self._head)
        rehearse_drafts(self._sampler, torch.zeros(num_seqs, vocab, device=self.model.device))

    @torch.inference_mode()
    def propose(self, wanted: SequenceOf[DraftRequest]) -> dict[str, Proposal]:
        drafts = [_Draft(one.seq, one.num_tokens) for one in wanted if one.num_tokens > 0]
        first = [(draft.seq, draft.seq.num_tokens) for draft in drafts]
        for one in wanted:
            if one.num_tokens == 0 and one.num_catch_up > 0:
                end = min(one.seq.num_tokens - 1, self._num_computed(one.seq) + one.num_catch_up)
                first.append((one.seq, end))
        if not first:
            return {}
        logits = self._first_pass(first, len(drafts))
        if logits is not None:
            self._extend(drafts, logits)
        while drafting := [draft for draft in drafts if draft.goes_on]:
            drafting.sort(key=lambda draft: draft.num_tokens, reverse=True)
            self._extend(drafting, self._next_pass(drafting))
        for draft in drafts:
            self._num_written[draft.seq.seq_id] += max(0, len(draft.tokens) - 1)
        return {d.seq.seq_id: d.proposal for d in drafts if d.tokens}

    def _first_pass(self, ends: list[tuple[Sequence, int]], num_rows: int) -> Tensor | None:
        """Run tokens without draft KV up to an end; return the logits of the first sequences."""
        chunks = []
        for seq, end in ends:
            start = self._num_computed(seq)
            chunks.append(Chunk(seq.token_ids[start:end], start, seq.block_table))
            self._note(seq, start, end)
        order = sorted(range(len(chunks)), key=lambda i: _is_prefill(chunks[i]))
        hidden = self.model.forward(
            [chunks[i] for i in order], sum(not _is_prefill(chunk) for chunk in chunks)
        )
        if not num_rows:
            return None
        last, row = {}, -1
        for i in order:
            row += len(chunks[i].token_ids)
            last[i] = row
        return self._logits(self.model.rows(hidden, [last[i] for i in range(num_rows)]))

    def _next_pass(self, drafts: list[_Draft]) -> Tensor:
        """Return the logits behind the newest drafted token of each."""
        chunks = [
            Chunk(draft.tokens[-1:], draft.seq.num_tokens + len(draft.tokens) - 1, draft.table)
            for draft in drafts
        ]
        return self._logits(self.model.forward(chunks, len(chunks)))

    def _extend(self, drafts: list[_Draft], logits: Tensor) -> None:
        """Add one more token to each draft, unless its logits allow none."""
        rows = [SamplingRow(draft.seq, tuple(draft.tokens)) for draft in drafts]
        # Without penalties or draws the most likely token is the same in a trimmed head.
        plain = all(row.is_plain for row in rows)
        head_ids = self._head_ids if plain else None
        if self._head is not None and not plain:
            full = logits.new_full((len(rows), self._vocab_size), -torch.inf)
            logits = full.index_copy_(1, self._head, logits)
        for draft, (token, probabilities) in zip(
            drafts, self._sampler.draft(logits, rows), strict=True
        ):
            if token == INVALID:
                draft.num_tokens = 0
                continue
            draft.tokens.append(token if head_ids is None else head_ids[token])
            if probabilities is not None:
                draft.probabilities.append(probabilities)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.model.logits(hidden)

    def _num_computed(self, seq: Sequence) -> int:
        """Return the number of a sequence's tokens that have draft KV."""
        written = self._num_written.get(seq.seq_id)
        return self._num_cached(seq) if written is None else written

    def _num_cached(self, seq: Sequence) -> int:
        """Return the number of a sequence's first tokens whose blocks came with their draft KV."""
        num = 0
        for block, digest in zip(seq.block_table, seq.block_hashes, strict=False):
            if self._digests.get(block) != digest:
                break
            num += 1
        return num * self.model.block_size

    def _note(self, seq: Sequence, start: int, end: int) -> None:
        """Note that draft KV of these tokens of a sequence is about to be written."""
        size = self.model.block_size
        for place in range(start // size):
            if place < len(seq.block_hashes):
                self._digests[seq.block_table[place]] = seq.block_hashes[place]
        for place in range(start // size, len(seq.block_table)):
            self._digests.pop(seq.block_table[place], None)
        self._num_written[seq.seq_id] = end


class _Draft:
    """The draft of one sequence while it is made."""

    __slots__ = ("num_tokens", "probabilities", "seq", "table", "tokens")

    def __init__(self, seq: Sequence, num_tokens: int) -> None:
        self.seq = seq
        self.num_tokens = num_tokens
        self.table = seq.block_table
        self.tokens: list[int] = []
        self.probabilities: list[Tensor] = []

    @property
    def goes_on(self) -> bool:
        return len(self.tokens) < self.num_tokens

    @property
    def proposal(self) -> Proposal:
        return Proposal(tuple(self.tokens), tuple(self.probabilities) or None)


def _is_prefill(chunk: Chunk) -> bool:
    return len(chunk.token_ids) > MOST_DECODE_TOKENS
