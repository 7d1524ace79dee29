"""`PagedModel`: a model, its KV cache, and forward passes over chunks of sequences."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.base import CausalLM


class Chunk(NamedTuple):
    """Tokens of one sequence to run: the first of them stands at position ``start``."""

    token_ids: SequenceOf[int]
    start: int
    block_table: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class PagedModel:
    """Runs chunks on one device. Knows nothing of sequences, planning or sampling.

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

    @torch.inference_mode()
    def forward(self, chunks: SequenceOf[Chunk], num_decodes: int) -> Tensor:
        """Final hidden states ``[num_tokens, hidden]`` of all chunks, one behind the other.

        Writes KV for their tokens.

        Args:
            num_decodes: how many of the first chunks are decodes: one token, or a few that
                were drafted behind it.
        """
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [p for chunk in chunks for p in range(chunk.start, chunk.end)]
        metadata = self._metadata(chunks, num_decodes)
        self.backend.prepare(metadata)
        return self.model.forward(
            self.tensor(token_ids), self.tensor(positions), self.kv, self.backend, metadata
        )

    def tensor(self, values: list) -> Tensor:
        """Integers on the device, int64."""
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    def _metadata(self, chunks: SequenceOf[Chunk], num_decodes: int) -> AttentionMetadata:
        slots: list[int] = []
        starts, size = [0], self.block_size
        for chunk in chunks:
            table = chunk.block_table
            slots += [table[p // size] * size + p % size for p in range(chunk.start, chunk.end)]
            starts.append(len(slots))
        widest = max(len(chunk.block_table) for chunk in chunks)
        tables = [chunk.block_table + [0] * (widest - len(chunk.block_table)) for chunk in chunks]
        return AttentionMetadata(
            query_start_loc=starts,
            seq_lens=[chunk.end for chunk in chunks],
            block_tables=self.tensor(tables),
            slot_mapping=self.tensor(slots),
            block_size=size,
            num_decodes=num_decodes,
        )

    @torch.inference_mode()
    def dry_run(self, num_tokens: int, num_seqs: int) -> None:
        """Run a batch of zeros at the given size, without KV of anyone being touched.

        Warms up libraries and, on a GPU, leaves the peak memory of the largest batch
        reserved, so that what is free afterwards can go to the KV cache.
        """
        num_blocks = -(-num_tokens // self.block_size)
        scratch = self.backend.allocate(
            num_blocks, self.block_size, self.kv[0].key.dtype, self.device
        )
        metadata = self._metadata([Chunk([0] * num_tokens, 0, list(range(num_blocks)))], 0)
        self.backend.prepare(metadata)
        zeros = self.tensor([0] * num_tokens)
        hidden = self.model.forward(zeros, zeros, [scratch] * len(self.kv), self.backend, metadata)
        self.model.logits(hidden[: min(num_seqs, num_tokens)])
