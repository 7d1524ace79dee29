"""`ModelRunner`: a batch of sequences -> tensors -> one mixed forward pass -> sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minserve.engine.paged_model import Chunk, PagedModel
from minserve.engine.sampler import Proposal, Sampler, Verified
from minserve.errors import GenerationError
from minserve.outputs import TokenLogprob
from minserve.request import Sequence

# Prompt logprobs need logits of every prompt row; this many rows are held at a time.
PROMPT_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence and how many of its uncomputed tokens this iteration runs.

    Attributes:
        proposal: drafted tokens to run, and verify, behind them.
    """

    seq: Sequence
    num_tokens: int
    proposal: Proposal | None = None

    @property
    def drafted(self) -> tuple[int, ...]:
        return () if self.proposal is None else self.proposal.token_ids

    @property
    def samples(self) -> bool:
        """True where the chunk reaches the newest token, so that the next one is sampled."""
        return self.num_tokens == self.seq.num_uncomputed_tokens

    @property
    def start(self) -> int:
        return self.seq.num_computed_tokens

    @property
    def end(self) -> int:
        """Where the sequence's own tokens of this iteration end; drafts come behind."""
        return self.seq.num_computed_tokens + self.num_tokens

    @property
    def chunk(self) -> Chunk:
        own = self.seq.token_ids[self.start : self.end]
        return Chunk([*own, *self.drafted], self.start, self.seq.block_table)


@dataclass(slots=True)
class RunResult:
    """What the forward pass gave for one sequence.

    Attributes:
        sampled: the next tokens, the error that their sampling met, or ``None`` where the
            chunk did not reach the end.
        prompt_logprobs: of prompt tokens ``start + 1 .. end`` where asked for.
    """

    sampled: Verified | GenerationError | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Flight:
    """A batch that was handed to the device. `results` waits for what it gives."""

    def __init__(self, results: dict[str, RunResult]) -> None:
        self._results = results

    def results(self) -> dict[str, RunResult]:
        """By sequence id."""
        return self._results


class ModelRunner(PagedModel):
    """Runs batches of the target model. Knows nothing of planning, text or requests' ends."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sampler = Sampler()

    def run(self, batch: SequenceOf[Scheduled]) -> dict[str, RunResult]:
        """`launch`, and wait for the results."""
        return self.launch(batch).results()

    @torch.inference_mode()
    def launch(self, batch: SequenceOf[Scheduled]) -> Flight:
        """One forward pass, handed to the device.

        Writes KV for the scheduled tokens and changes no sequence, so that the same
        batch, or a part of it, can be run again.
        """
        batch = sorted(batch, key=lambda s: not s.seq.is_decoding)
        chunks = [item.chunk for item in batch]
        hidden = self.forward(chunks, sum(item.seq.is_decoding for item in batch))
        first_rows, row = [], 0
        for chunk in chunks:
            first_rows.append(row)
            row += len(chunk.token_ids)
        results = {item.seq.seq_id: RunResult() for item in batch}
        self._sample(batch, first_rows, hidden, results)
        self._prompt_logprobs(batch, first_rows, hidden, results)
        return Flight(results)

    def _sample(
        self,
        batch: SequenceOf[Scheduled],
        first_rows: list[int],
        hidden: Tensor,
        results: dict[str, RunResult],
    ) -> None:
        sampling, rows = [], []
        for item, first in zip(batch, first_rows, strict=True):
            if item.samples:
                sampling.append(item)
                newest = first + item.num_tokens - 1
                rows += range(newest, newest + len(item.drafted) + 1)
        if not sampling:
            return
        if len(rows) < hidden.shape[0]:
            hidden = hidden[self.tensor(rows)]
        seqs = [item.seq for item in sampling]
        proposals = [item.proposal for item in sampling]
        sampled = self.sampler.verify(self.model.logits(hidden), seqs, proposals)
        for seq, tokens in zip(seqs, sampled, strict=True):
            results[seq.seq_id].sampled = tokens

    def _prompt_logprobs(
        self,
        batch: SequenceOf[Scheduled],
        first_rows: list[int],
        hidden: Tensor,
        results: dict[str, RunResult],
    ) -> None:
        """The row of prompt token p predicts token p + 1."""
        for item, first_row in zip(batch, first_rows, strict=True):
            wanted = item.seq.request.params.prompt_logprobs
            last = min(item.end, item.seq.num_prompt_tokens - 1)
            if wanted is None or item.start >= last:
                continue
            for begin in range(item.start, last, PROMPT_LOGPROB_ROWS):
                end = min(begin + PROMPT_LOGPROB_ROWS, last)
                rows = hidden[first_row + begin - item.start : first_row + end - item.start]
                targets = item.seq.token_ids[begin + 1 : end + 1]
                results[item.seq.seq_id].prompt_logprobs += self.sampler.prompt_logprobs(
                    self.model.logits(rows), targets, wanted
                )
