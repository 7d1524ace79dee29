"""`PagedModel`: a model, its KV cache, and forward passes over chunks of sequences."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from minserve.blocks import blocks_for
from minserve.engine.device import transfers
from minserve.engine.device.batch_tensors import (
    BatchLayout,
    BatchTensors,
    Chunk,
    fill_in,
    place,
)
from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.kernels.upload import to_device
from minserve.models.base import CausalLM
from minserve.planner.predict.eager import MixedLimit, is_eager


class RecordedPasses(Protocol):
    """Passes that were recorded beforehand: over decodes, and over some batches with prefills."""

    @property
    def mixed(self) -> MixedLimit:
        """The largest batches with prefills that were recorded."""

    @property
    def num_recorded(self) -> int:
        """The number of passes."""

    def forward(
        self, chunks: SequenceOf[Chunk], num_decodes: int, newest: Tensor | None = None
    ) -> Tensor | None:
        """Return hidden states as `PagedModel.forward` does, or ``None`` where no pass fits."""

    def replay(self, number: int, fill: Callable[[Tensor], None]) -> None:
        """Replay the pass of that number, once its packed inputs were put where it reads them."""


class Company(Protocol):
    """Other ranks that run the same passes, each with its share of the model.

    It is the context of each step: it raises `RankLostError` where they cannot go on together.
    """

    @property
    def size(self) -> int:
        """The number of ranks, this one included."""

    @property
    def is_lost(self) -> bool:
        """True where the ranks run nothing together any more."""

    def forward(
        self, layout: BatchLayout, num_decodes: int, lengths: list[int], inputs: Tensor
    ) -> None:
        """Have them run a pass over packed inputs, with what the host knows of their lengths."""

    def replay(self, number: int, inputs: Tensor) -> None:
        """Have them replay the recorded pass of that number."""

    def logits(self, hidden: Tensor) -> None:
        """Have them compute their part of the logits."""

    def check(self) -> None:
        """Raise `RankLostError` where the ranks run nothing together any more."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class PagedModel:
    """Runs chunks on one device. Knows nothing of sequences, planning or sampling.

    Args:
        kv: one cache per layer.

    Attributes:
        graphs: recorded passes; set once ``kv`` is allocated, if the device has graphs.
        company: the other ranks, on rank 0 of a group.
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
        self.graphs: RecordedPasses | None = None
        self.company: Company | None = None

    @property
    def is_lost(self) -> bool:
        """True where the device runs nothing any more. Asking waits for the device."""
        if self.company is not None and self.company.is_lost:
            return True
        return transfers.is_lost(self.device)

    @torch.inference_mode()
    def forward(
        self, chunks: SequenceOf[Chunk], num_decodes: int, newest: Tensor | None = None
    ) -> Tensor:
        """Return final hidden states ``[num_tokens, hidden]`` of all chunks, one behind the other.

        It writes the KV of their tokens. On a GPU all of it is queued, and where the pass was
        recorded the result holds until the next such pass is queued.

        Args:
            num_decodes: how many of the first chunks are decodes: one token, or a few that
                were drafted behind it.
            newest: int64 ``[rows]`` on the device: the tokens for which the chunks have an
                `unknown_token`; ``None`` where the host knows all.
        """
        with self.company or nullcontext():
            if self.graphs is not None:
                num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
                if not is_eager(len(chunks), num_decodes, num_tokens, self.graphs.mixed):
                    hidden = self.graphs.forward(chunks, num_decodes, newest)
                    if hidden is not None:
                        return hidden
            return self._run(chunks, num_decodes, self.kv, newest)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of some rows of hidden states, as `CausalLM.logits` does."""
        with self.company or nullcontext():
            if self.company is not None:
                self.company.logits(hidden)
            return self.model.logits(hidden)

    def forward_tensors(
        self,
        inputs: BatchTensors[Tensor],
        query_start_loc: list[int],
        seq_lens: list[int],
        num_decodes: int,
        kv: SequenceOf[LayerKV],
        lengths_known: bool = True,
    ) -> Tensor:
        """Do the work of `forward` for inputs on the device, with what the host knows of them.

        Args:
            query_start_loc, seq_lens, lengths_known: as in `AttentionMetadata`.
        """
        metadata = AttentionMetadata(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            block_size=self.block_size,
            num_decodes=num_decodes,
            lengths_known=lengths_known,
            starts=inputs.starts,
            lengths=inputs.lengths,
        )
        self.backend.prepare(metadata)
        return self.model.forward(inputs.token_ids, inputs.positions, kv, self.backend, metadata)

    def rows(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Return some rows of hidden states, ``[len(rows), hidden]``."""
        return hidden[to_device(rows, torch.int64, self.device)]

    @torch.inference_mode()
    def dry_run(
        self, num_tokens: int, longest: int, num_seqs: int = 1, max_queries: int = 1
    ) -> None:
        """Run batches of zeros that touch no sequence's KV.

        The first has the given size, and tokens are drawn from it; then come decodes, few and many,
        of up to so many query tokens, and chunks of all kinds and sizes. This warms up libraries and
        compiles kernels, for which no request should wait. On a GPU it leaves the peak memory of the
        largest batch reserved, so that what is free afterwards can go to the KV cache.

        Args:
            longest: the most tokens of one sequence.
            num_seqs, max_queries: the most sequences of the largest batch, and the most tokens
                of each whose logits are needed.
        """
        longest = min(longest, num_tokens)
        blocks = list(range(blocks_for(longest, self.block_size)))
        scratch = self.backend.allocate(len(blocks), self.block_size, self.kv[0].dtype, self.device)
        kv = [scratch] * len(self.kv)
        sizes = [min(longest, num_tokens - done) for done in range(0, num_tokens, longest)]
        hidden = self._run([Chunk([0] * size, 0, blocks) for size in sizes], 0, kv)
        max_queries = min(max_queries, longest)
        most = max(1, min(num_seqs, len(hidden) // max_queries))
        self._rehearse(self.model.logits(hidden[: most * max_queries]), max_queries)
        del hidden
        for num in range(1, max_queries + 1):
            for most in (1, max(1, min(num_seqs, num_tokens // num))):
                self._run([Chunk([0] * num, longest - num, blocks)] * most, most, kv)
        for size in self.backend.chunk_sizes:
            if size <= longest:
                for start in (0, longest - size):  # behind a long context it may be split
                    self._run([Chunk([0] * size, start, blocks)], 0, kv)
        if transfers.runs_behind(self.device):
            # Libraries have kernels for ranges of rows, each loaded when it is first used.
            for power in range(longest.bit_length()):
                self._run([Chunk([0] * 2**power, 0, blocks)], 0, kv)

    def _rehearse(self, logits: Tensor, max_queries: int) -> None:
        """Draw from the logits of a dry run, of so many tokens of each sequence, if it is to draw."""

    def _run(
        self,
        chunks: SequenceOf[Chunk],
        num_decodes: int,
        kv: SequenceOf[LayerKV],
        newest: Tensor | None = None,
    ) -> Tensor:
        layout = BatchLayout.of(chunks)
        host, parts = place(chunks, layout, self.block_size, self.device)
        inputs = host.to(self.device, non_blocking=True)
        if newest is not None:
            fill_in(layout.split(inputs).token_ids, newest)
        starts, lengths = parts.starts.tolist(), parts.lengths.tolist()
        if self.company is not None:
            self.company.forward(layout, num_decodes, starts + lengths, inputs)
        return self.forward_tensors(layout.split(inputs), starts, lengths, num_decodes, kv)
