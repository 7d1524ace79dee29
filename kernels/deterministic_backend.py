"""Attention on a CPU whose result for a token depends on its sequence alone, to the last bit.

A matmul of another shape may add in another order. So the shape of every matmul that a query is in
follows from its position: a sequence's positions fall into tiles of `QUERY_TILE`, a tile is
computed as a whole even where only one of its queries is in the batch, each query has its own place
in the tile, and the keys that a tile sees are padded to whole spans of `KEY_SPAN`. Decodes, prefill
chunks and verified drafts all go this way, so that how a sequence was divided into chunks, and
which other sequences are in the batch, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.kernels.attention import DETERMINISTIC, AttentionMetadata, LayerKV
from minserve.kernels.torch_backend import TorchBackend, rotate_

# Queries that are computed together. A lone decode does the work of a whole tile.
QUERY_TILE = 8
KEY_SPAN = 64
# torch divides elementwise work on more numbers than these among threads, and at a border between
# two threads numbers are computed one by one, which may round otherwise.
MOST_UNDIVIDED = 32767


class _Tile(NamedTuple):
    """The queries of one tile that are in the batch.

    Attributes:
        number: which tile of the span it is.
        rows: the queries' rows of the batch.
        places: the queries' places in the tile.
    """

    number: int
    rows: slice
    places: slice


class _KeySpan(NamedTuple):
    """Tiles of a sequence that see equally many keys.

    Attributes:
        slots: int64 ``[existing keys]``: where the keys are that exist.
        num_keys: that number, filled up to whole spans.
    """

    slots: Tensor
    num_keys: int
    tiles: list[_Tile]


class DeterministicBackend(TorchBackend):
    """The torch backend with matmuls of fixed shapes. Queries and cache have one dtype."""

    name = DETERMINISTIC
    _unseen: Tensor | None = None

    def prepare(self, metadata: AttentionMetadata) -> None:
        starts = metadata.query_start_loc
        metadata.state = [
            span
            for i, seq_len in enumerate(metadata.seq_lens)
            for span in _spans(
                slice(starts[i], starts[i + 1]),
                seq_len,
                metadata.block_tables[i],
                metadata.block_size,
            )
        ]

    def write_kv(
        self,
        qkv: Tensor,
        kv: LayerKV,
        metadata: AttentionMetadata,
        rotations: Tensor | None = None,
    ) -> None:
        if rotations is not None:
            num_rotated = self.num_heads + self.num_kv_heads
            at_once = max(1, MOST_UNDIVIDED // (num_rotated * self.head_dim))
            for start in range(0, len(qkv), at_once):
                some = slice(start, start + at_once)
                rotate_(qkv[some, :num_rotated], rotations[some])
        new = qkv.narrow(1, self.num_heads, 2 * self.num_kv_heads).transpose(0, 1)
        kv.views.tokens.index_copy_(1, metadata.slot_mapping, new.to(kv.key.dtype))

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        out = query.new_empty(query.shape[0], self.num_heads, self.head_dim)
        for span in metadata.state:
            key, value = self._read(kv, span)
            for tile in span.tiles:
                out[tile.rows] = self._tile(query[tile.rows], key, value, tile)
        return out.flatten(1)

    def _read(self, kv: LayerKV, span: _KeySpan) -> tuple[Tensor, Tensor]:
        """Return keys and values, each ``[num_kv_heads, num_keys, head_dim]``, zeros at the end."""
        shape = (2, self.num_kv_heads, span.num_keys, self.head_dim)
        size = 2 * self.num_kv_heads * span.num_keys * self.head_dim
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=kv.key.dtype)
        both = self._scratch[:size].view(shape)
        num = len(span.slots)
        both[:, :, :num] = kv.views.pairs.index_select(2, span.slots)
        both[:, :, num:].zero_()
        return both[0], both[1]

    def _tile(self, query: Tensor, key: Tensor, value: Tensor, tile: _Tile) -> Tensor:
        """Return ``[queries, num_heads, head_dim]`` of the tile's queries in the batch."""
        group, num_keys = self.num_heads // self.num_kv_heads, key.shape[1]
        whole = query.new_zeros(QUERY_TILE, self.num_kv_heads, group, self.head_dim)
        whole[tile.places] = query.view(-1, self.num_kv_heads, group, self.head_dim)
        whole = whole.permute(1, 2, 0, 3).reshape(self.num_kv_heads, -1, self.head_dim)
        scores = torch.bmm(whole, key.mT).mul_(self.scale)
        newest = scores.view(-1, QUERY_TILE, num_keys)[:, :, -KEY_SPAN:]
        newest += self._mask(scores.dtype)[tile.number]
        out = torch.bmm(torch.softmax(scores, dim=-1), value)
        out = out.view(self.num_kv_heads, group, QUERY_TILE, self.head_dim)[:, :, tile.places]
        return out.permute(2, 0, 1, 3).reshape(-1, self.num_heads, self.head_dim)

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """Return -inf where a query does not see a key of its own span, else 0: ``[tiles of a span,
        QUERY_TILE, KEY_SPAN]``.
        """
        if self._unseen is None or self._unseen.dtype != dtype:
            unseen = torch.full((KEY_SPAN, KEY_SPAN), -torch.inf).triu_(1)
            self._unseen = unseen.view(-1, QUERY_TILE, KEY_SPAN).to(dtype)
        return self._unseen


def _spans(rows: slice, seq_len: int, table: Tensor, block_size: int) -> Iterator[_KeySpan]:
    """Divide a sequence's queries, its last tokens, into spans and tiles by their positions."""
    start = seq_len - (rows.stop - rows.start)
    shift = rows.start - start  # from a position to its row
    position = torch.arange(seq_len)
    slots = table[position // block_size] * block_size + position % block_size
    while start < seq_len:
        num_keys = (start // KEY_SPAN + 1) * KEY_SPAN
        tiles = []
        for first in range(start - start % QUERY_TILE, min(seq_len, num_keys), QUERY_TILE):
            begin, end = max(first, start), min(first + QUERY_TILE, seq_len)
            tiles.append(
                _Tile(
                    first % KEY_SPAN // QUERY_TILE,
                    slice(begin + shift, end + shift),
                    slice(begin - first, end - first),
                )
            )
        yield _KeySpan(slots[:num_keys], num_keys, tiles)
        start = num_keys
