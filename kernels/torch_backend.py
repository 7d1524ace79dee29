"""Attention in plain torch operations: the reference, and the CPU path.

Decodes are batched: keys and values of all decoding sequences are gathered by one
`index_select` over their blocks, straight into ``[sequences * kv heads, tokens,
head_dim]``, and the heads of a GQA group share one matmul over them. Sequences of
similar length are grouped, so that padding at most doubles the work. Each prefill chunk
runs through torch's fused attention over its own blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV

# A group of decodes ends where the next sequence is shorter than this share of the longest.
GROUP_MIN_FILL = 0.5


class _Views(NamedTuple):
    """A layer's memory, ``[num_blocks, 2 (key, value), num_kv_heads, block_size, head_dim]``,
    seen as rows.

    Attributes:
        blocks: ``[num_blocks * 2 * num_kv_heads, block_size * head_dim]``.
        tokens: ``[num_blocks * 2 * num_kv_heads * block_size, head_dim]``.
    """

    blocks: Tensor
    tokens: Tensor


@dataclass(slots=True)
class _Decodes:
    """Decoding sequences of similar length, with equally many query tokens each.

    Attributes:
        tokens: their rows of the batch: a slice where adjacent, else int64 indices.
        rows: int64 ``[2 * sequences * kv heads * blocks]``: which of `_Views.blocks` to
            gather, keys first.
        visible: bool ``[sequences, queries, padded length]``: who may look where.
        bias: the same as 0 / -inf in float32, ``[sequences * kv heads, queries * group
            or 1, padded length]``. Made by the first layer that needs it; the fused
            kernel does not.
    """

    tokens: slice | Tensor
    rows: Tensor
    visible: Tensor
    bias: Tensor | None = None


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
        new_rows: int64 ``[2 * num_tokens * kv heads]``: which of `_Views.tokens` new keys,
            then new values, replace.
    """

    new_rows: Tensor
    decodes: list[_Decodes] = field(default_factory=list)
    prefills: list[_Prefill] = field(default_factory=list)


class TorchBackend(AttentionBackend):
    """The torch backend. Runs on any device and in any float dtype."""

    name = "torch"
    _scratch: Tensor | None = None

    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerKV:
        """A cache in which the tokens of one head in one block lie together, so that
        gathering rows of (block, head) yields each head's keys in one piece.

        Zeroed, since a masked NaN would still poison a sum.
        """
        size = (num_blocks, 2, self.num_kv_heads, block_size, self.head_dim)
        memory = _zeros(size, dtype, device)
        views = _Views(memory.view(-1, block_size * self.head_dim), memory.view(-1, self.head_dim))
        return LayerKV(memory[:, 0].transpose(1, 2), memory[:, 1].transpose(1, 2), views)

    def prepare(self, metadata: AttentionMetadata) -> None:
        blocks = metadata.slot_mapping // metadata.block_size
        offsets = metadata.slot_mapping % metadata.block_size
        rows = self._rows(blocks.unsqueeze(1)) * metadata.block_size + offsets.view(1, -1, 1, 1)
        state = _State(rows.flatten())
        for sequences in _similar_decodes(metadata):
            state.decodes.append(self._prepare_decodes(sequences, metadata))
        for i in range(metadata.num_decodes, metadata.num_seqs):
            state.prefills.append(self._prepare_prefill(i, metadata))
        metadata.state = state

    def write_kv(
        self,
        qkv: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        rotations: Tensor | None = None,
    ) -> None:
        num_rotated = self.num_heads + self.num_kv_heads
        if rotations is not None:
            _rotate_(qkv[:, :num_rotated], rotations)
        new = torch.stack((qkv[:, self.num_heads : num_rotated], qkv[:, num_rotated:]))
        new = new.view(-1, self.head_dim)
        kv.views.tokens.index_copy_(0, metadata.state.new_rows, new)

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        state = metadata.state
        if len(state.decodes) == 1 and not state.prefills:
            return self._decode(query, kv, state.decodes[0]).flatten(1)
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
        return _Decodes(tokens, self._rows(tables[:, :num_blocks]).flatten(), visible)

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
        rows = self._rows(metadata.block_tables[i : i + 1, :num_blocks]).flatten()
        return _Prefill(tokens, rows, seq_len, mask)

    def _rows(self, tables: Tensor) -> Tensor:
        """``[sequences, blocks]`` block ids to ``[2, sequences, kv heads, blocks]`` rows of
        `_Views.blocks`.
        """
        part = torch.arange(2, device=tables.device).view(-1, 1, 1, 1)
        head = torch.arange(self.num_kv_heads, device=tables.device).view(-1, 1)
        return (tables.unsqueeze(1) * 2 + part) * self.num_kv_heads + head

    def _gather(self, kv: LayerKV, rows: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``[num_seqs, num_kv_heads, tokens, head_dim]``, contiguous."""
        width = kv.views.blocks.shape[1]
        size = len(rows) * width
        # One buffer for all layers: fresh memory of this size is mapped page by page each
        # time, which took longer than the copy (32 sequences of 1200 tokens: 2 to 3 times).
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=kv.key.dtype, device=kv.key.device)
        gathered = self._scratch[:size].view(-1, width)
        torch.index_select(kv.views.blocks, 0, rows, out=gathered)
        return gathered.view(2, num_seqs, self.num_kv_heads, -1, self.head_dim).unbind(0)

    def _decode(self, query: Tensor, kv: LayerKV, decodes: _Decodes) -> Tensor:
        num_seqs, num_queries, _ = decodes.visible.shape
        key, value = self._gather(kv, decodes.rows, num_seqs)
        query = query.view(num_seqs, num_queries, self.num_heads, self.head_dim)
        if query.dtype is torch.float32 and query.device.type == "cpu":
            if decodes.bias is None:
                decodes.bias = self._bias(decodes.visible)
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
        key, value = self._gather(kv, prefill.rows, 1)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key[:, :, : prefill.seq_len],
            value[:, :, : prefill.seq_len],
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


def _rotate_(heads: Tensor, rotations: Tensor) -> None:
    """Rotate ``[num_tokens, num_heads, head_dim]`` in place (RoPE; Su et al., 2021)."""
    wide = heads.float()
    pairs = torch.view_as_complex(wide.view(*heads.shape[:-1], -1, 2))
    pairs.mul_(rotations)
    if wide is not heads:
        heads.copy_(wide)


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
