"""Attention in plain torch operations: the reference, and the CPU path.

Attention is two batched matmuls around a softmax; the heads of a GQA group share one matmul over
their keys. On CPUs this is faster than torch's fused attention for decodes, and in half precision
for prompts too (bench/cpu_attention.py), since fused attention packs keys anew for every head and
computes what causality hides. Decodes and short prefill chunks are batched: the blocks of
sequences with similarly many queries and keys are gathered by one `index_select` and padded. Any
other chunk, or a lone decode, runs by itself, its queries in blocks that see no key after them; if
its blocks are adjacent in memory, nothing is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minserve.blocks import blocks_for
from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.kernels.kv_quantization import KVScales, quantize, raw

# The smallest sequence of a group has at least this share of the largest one's queries, and of its
# tokens: padding does not double either.
GROUP_MIN_FILL = 0.51
# A prefill chunk with more scores per head is computed by itself: then padding, and keys that no
# query of a block sees, cost more than the operations of one more sequence.
MOST_GROUPED_SCORES = 128 * 256
# Queries of one sequence that share a matmul, in bytes of one score each: 128 of them in half
# precision, 64 in float32. Their scores stay in a core's own cache, and half of the last block of
# scores is computed for nothing.
QUERY_BLOCK_BYTES = 256


class _Views(NamedTuple):
    """A layer's memory, ``[2 (key, value), num_kv_heads, num_blocks, block_size, head_dim]``, in
    views.

    Attributes:
        blocks: ``[2 * num_kv_heads * num_blocks, block_size * head_dim]``.
        tokens: ``[2 * num_kv_heads, num_blocks * block_size, head_dim]``.
        pairs: ``[2, num_kv_heads, num_blocks * block_size, head_dim]``.
        scales: the scales in the same views, without head_dim; ``None`` if there are none.
    """

    blocks: Tensor
    tokens: Tensor
    pairs: Tensor
    scales: _Views | None = None

    @classmethod
    def of(cls, memory: Tensor, scales: _Views | None = None) -> _Views:
        """Return the views of ``[2, num_kv_heads, num_blocks, block_size, ...]``."""
        return cls(
            memory.flatten(3).flatten(0, 2), memory.flatten(0, 1).flatten(1, 2), memory.flatten(2, 3),
            scales,
        )  # fmt: skip


class _Gathered(NamedTuple):
    """The place where keys, or values, of some sequences are gathered; all layers share it.

    Attributes:
        rows: int64 ``[sequences * kv heads * blocks]``: indices into `_Views.blocks`.
        buffer: ``[len(rows), block_size * head_dim]``.
        tokens: the buffer as ``[sequences * kv heads, tokens, head_dim]``.
    """

    rows: Tensor
    buffer: Tensor
    tokens: Tensor

    def read(self, kv: LayerKV) -> Tensor:
        """Gather from a layer's cache and return `tokens`."""
        if kv.scales is None:
            torch.index_select(kv.views.blocks, 0, self.rows, out=self.buffer)
        else:
            stored = kv.views.blocks.index_select(0, self.rows).view(kv.key.dtype)
            scales = kv.views.scales.blocks.index_select(0, self.rows)
            values = stored.unflatten(1, (scales.shape[1], -1)).float().mul_(scales.unsqueeze(2))
            self.buffer.copy_(values.flatten(1))
        return self.tokens


@dataclass(slots=True)
class _PaddedGroup:
    """Sequences of similar length with similarly many query tokens.

    Each is padded to the most query tokens in the group, with copies of its last one.

    Attributes:
        tokens: the group's rows of the batch: a slice where adjacent, else int64 indices.
        tables: int64 ``[sequences, blocks]``, each padded with its first block.
        visible: bool ``[sequences, queries, padded length]``: true where a query sees a key.
        gathered: keys, values, and a bias of 0 where visible, else -inf, ``[sequences * kv heads,
            group * queries or 1, padded length]``; made by the first layer.
    """

    tokens: slice | Tensor
    tables: Tensor
    visible: Tensor
    gathered: tuple[_Gathered, _Gathered, Tensor] | None = None


@dataclass(slots=True)
class _Single:
    """A sequence that is computed by itself.

    Attributes:
        tokens: the sequence's rows of the batch.
        table: int64 ``[1, blocks]``.
        seq_len: number of tokens that it sees, its new ones included.
        first: slot of its first token if its blocks are adjacent in memory, else ``None``.
        gathered: as in `_PaddedGroup`, if its blocks are not adjacent.
    """

    tokens: slice
    table: Tensor
    seq_len: int
    first: int | None
    gathered: tuple[_Gathered, _Gathered] | None = None


@dataclass(slots=True)
class _TorchBatchState:
    """The plan that `prepare` computes once for all layers.

    Attributes:
        slot: slot of the only new token, on a CPU; ``None`` if there are more tokens.
        left_over: int64: slots behind the last tokens of sequences that enter a block, up to its
            end; ``None`` if there are none.
    """

    slot: int | None
    left_over: Tensor | None = None
    groups: list[_PaddedGroup] = field(default_factory=list)
    singles: list[_Single] = field(default_factory=list)


class TorchBackend(AttentionBackend):
    """The torch backend. It runs on any device and in any float dtype.

    Matmuls of a single sequence are in the queries' dtype, matmuls of a group in the cache's, and
    every softmax is in float32 within torch's operation. Keys and values in 8 bits are multiplied
    by their scales as they are gathered.
    """

    name = "torch"
    _scratch: Tensor | None = None
    _future: Tensor | None = None

    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerKV:
        """Return a zeroed cache in which each head's tokens lie together, block after block.

        It is zeroed, since a masked NaN would still spoil a sum.
        """
        size = (2, self.num_kv_heads, num_blocks, block_size)
        scales = scale_views = None
        if self.kv_form is not None:
            factors = _zeros(size, torch.float32, device)
            key_scales, value_scales = factors.transpose(1, 2).unbind(0)
            scales = KVScales(key_scales, value_scales, dtype)
            scale_views, dtype = _Views.of(factors), self.kv_form.dtype
        memory = _zeros((*size, self.head_dim), dtype, device)
        key, value = memory.permute(0, 2, 3, 1, 4).unbind(0)
        return LayerKV(key, value, _Views.of(raw(memory), scale_views), scales)

    def prepare(self, metadata: AttentionMetadata) -> None:
        slots = metadata.slot_mapping
        lone = len(slots) == 1 and slots.device.type == "cpu"  # a GPU would make the host wait
        # Upper bounds of lengths do not tell what is left over.
        left_over = _left_over(metadata) if metadata.lengths_known else None
        state = _TorchBatchState(int(slots[0]) if lone else None, left_over)
        for sequences in _similar(metadata):
            if len(sequences) > 1:
                state.groups.append(_prepare_group(sequences, metadata))
            else:
                state.singles.append(_prepare_single(sequences[0], metadata))
        metadata.state = state

    def write_kv(
        self,
        qkv: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        rotations: Tensor | None = None,
    ) -> None:
        if rotations is not None:
            rotate_(qkv.narrow(1, 0, self.num_heads + self.num_kv_heads), rotations)
        new = qkv.narrow(1, self.num_heads, 2 * self.num_kv_heads)
        if metadata.state.left_over is not None:
            # Groups read blocks whole. Masked or not, a NaN of the block's owner before would
            # spoil the sums of this one.
            kv.views.tokens.index_fill_(1, metadata.state.left_over, 0)
            if kv.scales is not None:
                kv.views.scales.tokens.index_fill_(1, metadata.state.left_over, 0)
        if self.kv_form is not None:
            stored, scales = quantize(new, self.kv_form)
            kv.views.scales.tokens.index_copy_(1, metadata.slot_mapping, scales.transpose(0, 1))
            kv.views.tokens.index_copy_(1, metadata.slot_mapping, raw(stored).transpose(0, 1))
            return
        slot = metadata.state.slot
        if slot is not None:  # cheaper than `index_copy_`, and it converts the dtype
            kv.views.tokens.select(1, slot).copy_(new.squeeze(0))
            return
        new = new.transpose(0, 1).to(kv.key.dtype)
        kv.views.tokens.index_copy_(1, metadata.slot_mapping, new)

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        state = metadata.state
        if not state.singles and len(state.groups) == 1:
            [group] = state.groups
            if isinstance(group.tokens, slice):
                return self._grouped(query, kv, group)
        elif not state.groups and len(state.singles) == 1:
            return self._single(query, kv, state.singles[0])
        out = query.new_empty(query.shape[0], self.num_heads * self.head_dim)
        for group in state.groups:
            out[group.tokens] = self._grouped(query[group.tokens], kv, group)
        for single in state.singles:
            out[single.tokens] = self._single(query[single.tokens], kv, single)
        return out

    def _grouped(self, query: Tensor, kv: LayerKV, group: _PaddedGroup) -> Tensor:
        """Return ``[tokens, num_heads * head_dim]`` of similar sequences together."""
        num_seqs, num_queries, _ = group.visible.shape
        if group.gathered is None:
            bias = self._bias(group.visible, kv.dtype)
            group.gathered = (*self._place(group.tables, kv), bias)
        # Values are gathered after the softmax, not with the keys: so each core multiplies by the
        # values that it has gathered itself, which are in its own cache.
        keys, values, bias = group.gathered
        key = keys.read(kv)
        dtype, per_kv_head = query.dtype, self.num_heads // self.num_kv_heads
        if num_queries > 1:
            query = query.view(num_seqs, num_queries, self.num_kv_heads, per_kv_head, self.head_dim)
            query = query.permute(0, 2, 3, 1, 4)
        query = query.reshape(key.shape[0], -1, self.head_dim).to(key.dtype)
        scores = torch.baddbmm(bias, query, key.mT, alpha=self.scale)
        out = torch.bmm(torch.softmax(scores, dim=-1), values.read(kv)).to(dtype)
        if num_queries > 1:
            out = out.view(num_seqs, self.num_kv_heads, per_kv_head, num_queries, self.head_dim)
            out = out.permute(0, 3, 1, 2, 4)
        return out.reshape(num_seqs * num_queries, -1)

    def _single(self, query: Tensor, kv: LayerKV, single: _Single) -> Tensor:
        """Return ``[tokens, num_heads * head_dim]`` of one sequence."""
        key, value = self._tokens_of(kv, single, query.dtype)
        num_queries, group = query.shape[0], self.num_heads // self.num_kv_heads
        if num_queries == 1:
            query = query.view(self.num_kv_heads, group, self.head_dim)
            scores = torch.bmm(query, key.mT).mul_(self.scale)
            return torch.bmm(torch.softmax(scores, dim=-1), value).view(1, -1)
        out = query.new_empty(num_queries, self.num_kv_heads, group, self.head_dim)
        num_before = single.seq_len - num_queries
        block = QUERY_BLOCK_BYTES // query.element_size()
        for begin in range(0, num_queries, block):
            end = min(begin + block, num_queries)
            seen = num_before + end
            out[begin:end] = self._query_block(query[begin:end], key[:, :seen], value[:, :seen])
        return out.flatten(1)

    def _query_block(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from a sequence's last queries to all of its keys, ``[num_kv_heads, tokens,
        head_dim]``.

        Returns:
            ``[queries, num_kv_heads, group, head_dim]``, not contiguous.
        """
        num_queries, num_keys = query.shape[0], key.shape[1]
        group = self.num_heads // self.num_kv_heads
        query = query.view(num_queries, self.num_kv_heads, group, self.head_dim)
        query = query.permute(1, 2, 0, 3).reshape(self.num_kv_heads, -1, self.head_dim)
        scores = query.new_empty(self.num_kv_heads, query.shape[1], num_keys)
        torch.baddbmm(scores, query, key.mT, beta=0, alpha=self.scale, out=scores)
        newest = scores.view(-1, num_queries, num_keys)[:, :, num_keys - num_queries :]
        newest += self._future_of(scores)[:num_queries, :num_queries]
        out = torch.bmm(torch.softmax(scores, dim=-1), value)
        out = out.view(self.num_kv_heads, group, num_queries, self.head_dim)
        return out.permute(2, 0, 1, 3)

    def _tokens_of(self, kv: LayerKV, single: _Single, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a sequence's keys and values, each ``[num_kv_heads, seq_len, head_dim]``."""
        if single.first is not None:
            own = kv.views.pairs.narrow(2, single.first, single.seq_len)
            if kv.scales is not None:
                scales = kv.views.scales.pairs.narrow(2, single.first, single.seq_len)
                own = own.view(kv.key.dtype).float().mul_(scales.unsqueeze(3))
            return own.to(dtype).unbind(0)
        if single.gathered is None:
            single.gathered = self._place(single.table, kv)
        key, value = (one.read(kv)[:, : single.seq_len].to(dtype) for one in single.gathered)
        return key, value

    def _place(self, tables: Tensor, kv: LayerKV) -> tuple[_Gathered, _Gathered]:
        """Return the places to gather keys and values, for block ids ``[sequences, blocks]``.

        One buffer serves all layers and groups: new memory of this size is mapped page by page
        each time, which took 2 to 3 times longer than the copy (32 sequences of 1200 tokens).
        """
        rows, width = self._rows(tables, kv), kv.views.blocks.shape[1]
        size = rows.numel() * width
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=kv.dtype, device=kv.key.device)
        buffers = self._scratch[:size].view(2, -1, width)
        tokens = buffers.view(2, len(tables) * self.num_kv_heads, -1, self.head_dim)
        key, value = map(_Gathered, rows, buffers, tokens)
        return key, value

    def _rows(self, tables: Tensor, kv: LayerKV) -> Tensor:
        """Return the rows of `_Views.blocks` that hold the block ids ``[sequences, blocks]``.

        Their order is ``[2 (key, value), sequences * kv heads * blocks]``.
        """
        num_blocks = kv.key.shape[0]
        head = torch.arange(2 * self.num_kv_heads, device=tables.device)
        head = head.view(2, 1, self.num_kv_heads, 1)
        return (head * num_blocks + tables.unsqueeze(1)).flatten(1)

    def _bias(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        bias.masked_fill_(~visible, -torch.inf)
        if visible.shape[1] > 1:
            bias = bias.repeat(1, self.num_heads // self.num_kv_heads, 1)
        return bias.repeat_interleave(self.num_kv_heads, dim=0)

    def _future_of(self, scores: Tensor) -> Tensor:
        """Return a block with -inf above the diagonal, at keys that a query may not see."""
        future = self._future
        if future is None or future.dtype != scores.dtype or future.device != scores.device:
            block = QUERY_BLOCK_BYTES // scores.element_size()
            future = torch.full((block, block), -torch.inf, device=scores.device).triu_(1)
            self._future = future = future.to(scores.dtype)
        return future


def _left_over(metadata: AttentionMetadata) -> Tensor | None:
    """Return `_TorchBatchState.left_over`."""
    size, starts = metadata.block_size, metadata.query_start_loc
    seqs: list[int] = []
    places: list[int] = []
    offsets: list[int] = []
    for i, length in enumerate(metadata.seq_lens):
        place, used = divmod(length, size)
        if used and starts[i + 1] - starts[i] >= used:
            seqs += [i] * (size - used)
            places += [place] * (size - used)
            offsets += range(used, size)
    if not seqs:
        return None
    index = torch.tensor([seqs, places, offsets], device=metadata.block_tables.device)
    return metadata.block_tables[index[0], index[1]] * size + index[2]


def _prepare_group(sequences: list[int], metadata: AttentionMetadata) -> _PaddedGroup:
    starts, device = metadata.query_start_loc, metadata.slot_mapping.device
    counts = [starts[i + 1] - starts[i] for i in sequences]
    most, first, last = max(counts), sequences[0], sequences[-1]
    lengths, queries, firsts = torch.tensor(
        [[metadata.seq_lens[i] for i in sequences], counts, [starts[i] for i in sequences]],
        device=device,
    ).unsqueeze(2)
    # Query j of a sequence is at position length - queries + j. After a sequence's last query, that
    # query is repeated.
    nth = torch.minimum(torch.arange(most, device=device), queries - 1)
    adjacent = last - first + 1 == len(sequences)
    tables = metadata.block_tables[first : last + 1]
    if not adjacent:
        tables = metadata.block_tables[torch.tensor(sequences, device=device)]
    if adjacent and min(counts) == most:
        tokens = slice(starts[first], starts[last + 1])
    else:
        tokens = (firsts + nth).flatten()
    num_blocks = blocks_for(max(metadata.seq_lens[i] for i in sequences), metadata.block_size)
    position = torch.arange(num_blocks * metadata.block_size, device=device)
    visible = position <= (lengths - queries + nth).unsqueeze(2)
    num_own = (lengths + metadata.block_size - 1) // metadata.block_size
    # Padded with a block of its own, since block 0 may be another sequence's and hold NaN.
    is_own = torch.arange(num_blocks, device=device) < num_own
    tables = torch.where(is_own, tables[:, :num_blocks], tables[:, :1])
    return _PaddedGroup(tokens, tables, visible)


def _prepare_single(i: int, metadata: AttentionMetadata) -> _Single:
    tokens = slice(metadata.query_start_loc[i], metadata.query_start_loc[i + 1])
    seq_len = metadata.seq_lens[i]
    table = metadata.block_tables[i : i + 1, : blocks_for(seq_len, metadata.block_size)]
    blocks = table[0].tolist()
    adjacent = all(after == before + 1 for before, after in pairwise(blocks))
    first = blocks[0] * metadata.block_size if adjacent else None
    return _Single(tokens, table, seq_len, first)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that take no memory on a CPU until they are written.

    NumPy takes zeroed pages from the system; torch would write every byte at once.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(size)


def rotate_(heads: Tensor, rotations: Tensor) -> None:
    """Rotate ``[num_tokens, num_heads, head_dim]`` in place (RoPE; Su et al., 2021)."""
    is_wide = heads.dtype is torch.float32
    wide = heads if is_wide else heads.float()
    num_tokens, num_heads, _ = heads.shape
    torch.view_as_complex(wide.view(num_tokens, num_heads, -1, 2)).mul_(rotations)
    if not is_wide:
        heads.copy_(wide)


def _similar(metadata: AttentionMetadata) -> list[list[int]]:
    """Return groups of sequences whose queries and lengths are within `GROUP_MIN_FILL`.

    A sequence that is faster alone is a group of one.
    """
    starts, lengths = metadata.query_start_loc, metadata.seq_lens
    queries = [end - start for start, end in pairwise(starts)]
    small, groups = [], []
    for i, (count, length) in enumerate(zip(queries, lengths, strict=True)):
        if i >= metadata.num_decodes and count * length > MOST_GROUPED_SCORES:
            groups.append([i])
        else:
            small.append(i)
    for alike in _parts(small, queries):
        groups += [sorted(group) for group in _parts(alike, lengths)]
    return groups


def _parts(sequences: list[int], sizes: list[int]) -> list[list[int]]:
    """Split the sequences, largest first, so that none is below `GROUP_MIN_FILL` of its part's
    first.
    """
    parts: list[list[int]] = []
    for i in sorted(sequences, key=lambda i: sizes[i], reverse=True):
        if not parts or sizes[i] < GROUP_MIN_FILL * sizes[parts[-1][0]]:
            parts.append([])
        parts[-1].append(i)
    return parts
