"""Attention in plain torch operations: the reference, and the CPU path.

Decodes are batched: the blocks of all decoding sequences are gathered by one
`index_select` per cache, straight into ``[sequences * kv heads, tokens, head_dim]``,
and the heads of a GQA group share one matmul over them. Sequences of similar length
are grouped, so that padding at most doubles the work. Each prefill chunk runs through
torch's fused attention over its own blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV

# A group of decodes ends where the next sequence is shorter than this share of the longest.
GROUP_MIN_FILL = 0.5


@dataclass(slots=True)
class _Decodes:
    """Decoding sequences of similar length, with equally many query tokens each.

    Attributes:
        tokens: their rows of the batch: a slice where adjacent, else int64 indices.
        rows: int64 ``[sequences * kv heads * blocks]``: which (block, head) to gather.
        visible: bool ``[sequences, queries, padded length]``: who may look where.
        bias: the same as 0 / -inf in float32, ``[sequences * kv heads, queries * group
            or 1, padded length]``; ``None`` where the fused kernel is used.
    """

    tokens: slice | Tensor
    rows: Tensor
    visible: Tensor
    bias: Tensor | None


@dataclass(slots=True)
class _Prefill:
    """One prefill chunk; ``mask`` is bool ``[queries, seq_len]``, ``None`` where plainly causal."""

    tokens: slice
    rows: Tensor
    seq_len: int
    mask: Tensor | None


@dataclass(slots=True)
class _State:
    """What `prepare` computes once for all layers.

    Attributes:
        new_rows: int64 ``[num_tokens * kv heads]``: where new KV goes in a cache viewed as
            rows of (block, head, offset).
    """

    new_rows: Tensor
    decodes: list[_Decodes] = field(default_factory=list)
    prefills: list[_Prefill] = field(default_factory=list)


class TorchBackend(AttentionBackend):
    """The torch backend. Runs on any device and in any float dtype."""

    name = "torch"

    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerKV:
        """A cache in memory order ``[num_blocks, num_kv_heads, block_size, head_dim]``.

        A head's tokens of one block lie together, so that gathering (block, head) rows
        yields each head's keys in one piece. Zeroed, since a masked NaN would still
        poison a sum.
        """
        size = (num_blocks, self.num_kv_heads, block_size, self.head_dim)
        key, value = (_zeros(size, dtype, device) for _ in range(2))
        return LayerKV(key.transpose(1, 2), value.transpose(1, 2))

    def prepare(self, metadata: AttentionMetadata) -> None:
        size, heads = (
            metadata.block_size,
            torch.arange(self.num_kv_heads, device=metadata.slot_mapping.device),
        )
        blocks, offsets = metadata.slot_mapping // size, metadata.slot_mapping % size
        first_heads = blocks.unsqueeze(1) * self.num_kv_heads + heads
        state = _State((first_heads * size + offsets.unsqueeze(1)).flatten())
        for sequences in _similar_decodes(metadata):
            state.decodes.append(self._prepare_decodes(sequences, metadata))
        for i in range(metadata.num_decodes, metadata.num_seqs):
            state.prefills.append(self._prepare_prefill(i, metadata))
        metadata.state = state

    def write_kv(
        self, key: Tensor, value: Tensor, kv: LayerKV, metadata: AttentionMetadata
    ) -> None:
        rows = metadata.state.new_rows
        for cache, new in ((kv.key, key), (kv.value, value)):
            by_row = cache.transpose(1, 2).view(-1, self.head_dim)
            by_row.index_copy_(0, rows, new.reshape(-1, self.head_dim))

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        state = metadata.state
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for decodes in state.decodes:
            out[decodes.tokens] = self._decode(query[decodes.tokens], kv, decodes)
        for prefill in state.prefills:
            out[prefill.tokens] = self._prefill(query[prefill.tokens], kv, prefill)
        return out.flatten(1)

    def _prepare_decodes(self, sequences: list[int], metadata: AttentionMetadata) -> _Decodes:
        starts, device = metadata.query_start_loc, metadata.slot_mapping.device
        num_queries = starts[sequences[0] + 1] - starts[sequences[0]]
        lengths = torch.tensor([metadata.seq_lens[i] for i in sequences], device=device)
        if sequences == list(range(sequences[0], sequences[-1] + 1)):
            tables = metadata.block_tables[sequences[0] : sequences[-1] + 1]
            tokens = slice(starts[sequences[0]], starts[sequences[-1] + 1])
        else:
            tables = metadata.block_tables[torch.tensor(sequences, device=device)]
            firsts = torch.tensor([starts[i] for i in sequences], device=device)
            tokens = (firsts.unsqueeze(1) + torch.arange(num_queries, device=device)).flatten()
        num_blocks = -(-max(metadata.seq_lens[i] for i in sequences) // metadata.block_size)
        # Query j of a sequence stands at position length - num_queries + j.
        last = lengths.unsqueeze(1) - num_queries + torch.arange(num_queries, device=device)
        position = torch.arange(num_blocks * metadata.block_size, device=device)
        visible = position <= last.unsqueeze(2)
        return _Decodes(tokens, self._rows(tables[:, :num_blocks]), visible, self._bias(visible))

    def _bias(self, visible: Tensor) -> Tensor:
        bias = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
        if visible.shape[1] > 1:
            bias = bias.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        return bias.repeat_interleave(self.num_kv_heads, dim=0)

    def _prepare_prefill(self, i: int, metadata: AttentionMetadata) -> _Prefill:
        tokens = slice(metadata.query_start_loc[i], metadata.query_start_loc[i + 1])
        seq_len, num_queries = metadata.seq_lens[i], tokens.stop - tokens.start
        num_blocks = -(-seq_len // metadata.block_size)
        mask = None
        if seq_len > num_queries:
            position = torch.arange(seq_len, device=metadata.slot_mapping.device)
            mask = position <= position[seq_len - num_queries :].unsqueeze(1)
        rows = self._rows(metadata.block_tables[i : i + 1, :num_blocks])
        return _Prefill(tokens, rows, seq_len, mask)

    def _rows(self, tables: Tensor) -> Tensor:
        """(sequence, head, block) order over a cache viewed as rows of (block, head)."""
        heads = torch.arange(self.num_kv_heads, device=tables.device)
        return (tables.unsqueeze(1) * self.num_kv_heads + heads.view(1, -1, 1)).flatten()

    def _gather(self, cache: Tensor, rows: Tensor, num_seqs: int) -> Tensor:
        """``[num_seqs, num_kv_heads, tokens, head_dim]``, contiguous."""
        row_size = cache.shape[1] * self.head_dim
        gathered = cache.transpose(1, 2).view(-1, row_size).index_select(0, rows)
        return gathered.view(num_seqs, self.num_kv_heads, -1, self.head_dim)

    def _decode(self, query: Tensor, kv: LayerKV, decodes: _Decodes) -> Tensor:
        num_seqs, num_queries, _ = decodes.visible.shape
        key = self._gather(kv.key, decodes.rows, num_seqs)
        value = self._gather(kv.value, decodes.rows, num_seqs)
        query = query.view(num_seqs, num_queries, self.num_heads, self.head_dim)
        if query.dtype is torch.float32 and query.device.type == "cpu":
            return self._decode_matmul(query, key, value, decodes.bias)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key,
            value,
            attn_mask=decodes.visible.unsqueeze(1),
            scale=self.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _decode_matmul(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """The same as two batched matmuls, which torch's fused CPU kernel does slower for
        one query. float32 only: a half-precision score would be rounded before the softmax.
        """
        num_seqs, num_queries, heads, dim = query.shape
        group = heads // self.num_kv_heads
        if num_queries > 1:
            query = query.unflatten(2, (self.num_kv_heads, group)).transpose(1, 2)
        query = query.reshape(num_seqs * self.num_kv_heads, num_queries * group, dim)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=self.scale)
        out = torch.bmm(torch.softmax(scores, dim=-1), value)
        if num_queries > 1:
            out = out.view(num_seqs, self.num_kv_heads, num_queries, group, dim).transpose(1, 2)
        return out.reshape(num_seqs * num_queries, heads, dim)

    def _prefill(self, query: Tensor, kv: LayerKV, prefill: _Prefill) -> Tensor:
        key = self._gather(kv.key, prefill.rows, 1)[:, :, : prefill.seq_len]
        value = self._gather(kv.value, prefill.rows, 1)[:, :, : prefill.seq_len]
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key,
            value,
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory on a CPU until they are written.

    NumPy takes zeroed pages from the system; torch would write every byte at once.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(size)


def _similar_decodes(metadata: AttentionMetadata) -> list[list[int]]:
    """Groups of decodes with equally many queries and lengths within `GROUP_MIN_FILL`."""
    starts, lengths = metadata.query_start_loc, metadata.seq_lens
    by_queries: dict[int, list[int]] = {}
    for i in range(metadata.num_decodes):
        by_queries.setdefault(starts[i + 1] - starts[i], []).append(i)
    groups: list[list[int]] = []
    for sequences in by_queries.values():
        group: list[int] = []
        for i in sorted(sequences, key=lambda i: lengths[i], reverse=True):
            if group and lengths[i] < GROUP_MIN_FILL * lengths[group[0]]:
                groups.append(sorted(group))
                group = []
            group.append(i)
        if group:
            groups.append(sorted(group))
    return groups
