"""`ModelRunner`: a batch of sequences -> tensors -> one mixed forward pass -> sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minserve.engine.sampler import SampledToken, Sampler
from minserve.errors import GenerationError
from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.base import CausalLM
from minserve.outputs import TokenLogprob
from minserve.request import Sequence

# Prompt logprobs need logits of every prompt row; this many rows are held at a time.
PROMPT_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence and how many of its uncomputed tokens this iteration runs."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """True where the chunk reaches the newest token, so that the next one is sampled."""
        return self.num_tokens == self.seq.num_uncomputed_tokens

    @property
    def start(self) -> int:
        return self.seq.num_computed_tokens

    @property
    def end(self) -> int:
        return self.seq.num_computed_tokens + self.num_tokens


@dataclass(slots=True)
class RunResult:
    """What the forward pass gave for one sequence.

    Attributes:
        sampled: the next token, the error that its sampling met, or ``None`` where the
            chunk did not reach the end.
        prompt_logprobs: of prompt tokens ``start + 1 .. end`` where asked for.
    """

    sampled: SampledToken | GenerationError | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class ModelRunner:
    """Runs batches on one device. Knows nothing of planning, text or requests' ends.

    Args:
        kv: one cache per layer.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv: SequenceOf[LayerKV],
        block_size: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv = kv
        self.block_size = block_size
        self.device = device
        self.sampler = Sampler()

    @torch.inference_mode()
    def run(self, batch: SequenceOf[Scheduled]) -> dict[str, RunResult]:
        """One forward pass; results by sequence id.

        Writes KV for the scheduled tokens and changes no sequence, so that the same
        batch, or a part of it, can be run again.
        """
        batch = sorted(batch, key=lambda s: not s.seq.is_decoding)
        token_ids, positions, metadata = self._inputs(batch)
        self.backend.prepare(metadata)
        hidden = self.model.forward(token_ids, positions, self.kv, self.backend, metadata)
        results = {item.seq.seq_id: RunResult() for item in batch}
        self._sample(batch, metadata, hidden, results)
        self._prompt_logprobs(batch, metadata, hidden, results)
        return results

    def _inputs(self, batch: SequenceOf[Scheduled]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """Token ids and positions, int64 ``[num_tokens]``, and the attention metadata."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, size = [0], self.block_size
        for item in batch:
            table = item.seq.block_table
            token_ids += item.seq.token_ids[item.start : item.end]
            positions += range(item.start, item.end)
            slots += [table[p // size] * size + p % size for p in range(item.start, item.end)]
            starts.append(len(token_ids))
        widest = max(len(item.seq.block_table) for item in batch)
        tables = [
            item.seq.block_table + [0] * (widest - len(item.seq.block_table)) for item in batch
        ]
        metadata = AttentionMetadata(
            query_start_loc=starts,
            seq_lens=[item.end for item in batch],
            block_tables=self._tensor(tables),
            slot_mapping=self._tensor(slots),
            block_size=size,
            num_decodes=sum(item.seq.is_decoding for item in batch),
        )
        return self._tensor(token_ids), self._tensor(positions), metadata

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    def _sample(
        self,
        batch: SequenceOf[Scheduled],
        metadata: AttentionMetadata,
        hidden: Tensor,
        results: dict[str, RunResult],
    ) -> None:
        sampling = [i for i, item in enumerate(batch) if item.samples]
        if not sampling:
            return
        rows = [metadata.query_start_loc[i + 1] - 1 for i in sampling]
        if len(rows) < hidden.shape[0]:
            hidden = hidden[self._tensor(rows)]
        seqs = [batch[i].seq for i in sampling]
        sampled = self.sampler.sample(self.model.logits(hidden), seqs)
        for seq, token in zip(seqs, sampled, strict=True):
            results[seq.seq_id].sampled = token

    def _prompt_logprobs(
        self,
        batch: SequenceOf[Scheduled],
        metadata: AttentionMetadata,
        hidden: Tensor,
        results: dict[str, RunResult],
    ) -> None:
        """The row of prompt token p predicts token p + 1."""
        for i, item in enumerate(batch):
            wanted = item.seq.request.params.prompt_logprobs
            last = min(item.end, item.seq.num_prompt_tokens - 1)
            if wanted is None or item.start >= last:
                continue
            first_row = metadata.query_start_loc[i]
            for begin in range(item.start, last, PROMPT_LOGPROB_ROWS):
                end = min(begin + PROMPT_LOGPROB_ROWS, last)
                rows = hidden[first_row + begin - item.start : first_row + end - item.start]
                targets = item.seq.token_ids[begin + 1 : end + 1]
                results[item.seq.seq_id].prompt_logprobs += self.sampler.prompt_logprobs(
                    self.model.logits(rows), targets, wanted
                )

    @torch.inference_mode()
    def dry_run(self, num_tokens: int, num_seqs: int) -> None:
        """Run a batch of zeros at the given size, without KV of anyone being touched.

        Warms up libraries and, on a GPU, leaves the peak memory of the largest batch
        reserved, so that what is free afterwards can go to the KV cache.
        """
        scratch = [
            self.backend.allocate(
                -(-num_tokens // self.block_size), self.block_size, kv.key.dtype, self.device
            )
            for kv in self.kv[:1]
        ] * len(self.kv)
        num_blocks = scratch[0].key.shape[0]
        metadata = AttentionMetadata(
            query_start_loc=[0, num_tokens],
            seq_lens=[num_tokens],
            block_tables=self._tensor([list(range(num_blocks))]),
            slot_mapping=self._tensor(list(range(num_tokens))),
            block_size=self.block_size,
            num_decodes=0,
        )
        self.backend.prepare(metadata)
        zeros = self._tensor([0] * num_tokens)
        hidden = self.model.forward(zeros, zeros, scratch, self.backend, metadata)
        self.model.logits(hidden[: min(num_seqs, num_tokens)])
