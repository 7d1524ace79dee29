"""Lays a batch's inputs out in one buffer of integers, which takes one copy to the device."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import accumulate, chain, pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from minserve.engine.device import transfers

Array = TypeVar("Array", np.ndarray, Tensor)

NO_SLOT = -1  # of a token whose KV is not kept


def unknown_token(row: int) -> int:
    """Return what stands for a token that only the device knows yet: row ``row`` of its newest tokens."""
    return -1 - row


def fill_in(token_ids: Tensor, newest: Tensor) -> None:
    """Put the device's newest tokens in place of the numbers that stand for them; nothing waits.

    Args:
        token_ids: int64 ``[num_tokens]``, some of them from `unknown_token`; changed in place.
        newest: int64 ``[rows]`` on the same device.
    """
    rows = token_ids.bitwise_not().clamp_(min=0)  # ~n is -1 - n
    token_ids.copy_(torch.where(token_ids < 0, newest.index_select(0, rows), token_ids))


class Chunk(NamedTuple):
    """Tokens of one sequence to run: the first of them stands at position ``start``."""

    token_ids: SequenceOf[int]
    start: int
    block_table: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class BatchTensors(NamedTuple, Generic[Array]):
    """Views of one int64 buffer.

    Attributes:
        token_ids, positions, slot_mapping: ``[num_tokens]``.
        starts: ``[num_seqs + 1]``: the first token of each sequence, then their total.
        lengths: ``[num_seqs]``: tokens of each sequence that have KV after this batch.
        block_tables: ``[num_seqs, num_blocks]``, padded with 0.
    """

    token_ids: Array
    positions: Array
    slot_mapping: Array
    starts: Array
    lengths: Array
    block_tables: Array


class BatchLayout(NamedTuple):
    """The size of a batch, and with it the places of its inputs in a buffer.

    Attributes:
        num_tokens, num_seqs: their numbers, padding included.
        num_blocks: the width of the block tables.
    """

    num_tokens: int
    num_seqs: int
    num_blocks: int

    @classmethod
    def of(cls, chunks: SequenceOf[Chunk]) -> BatchLayout:
        """Return a layout that is just large enough for the chunks."""
        return cls(
            sum(len(chunk.token_ids) for chunk in chunks),
            len(chunks),
            max(len(chunk.block_table) for chunk in chunks),
        )

    @property
    def heading(self) -> int:
        """Numbers before the block tables."""
        return 3 * self.num_tokens + 2 * self.num_seqs + 1

    @property
    def size(self) -> int:
        """Numbers altogether."""
        return self.heading + self.num_seqs * self.num_blocks

    def split(self, buffer: Array) -> BatchTensors[Array]:
        """Return the views of a buffer ``[size]``."""
        tokens, seqs = self.num_tokens, self.num_seqs
        ends = accumulate((tokens, tokens, tokens, seqs + 1, seqs), initial=0)
        token_ids, positions, slot_mapping, starts, lengths = (
            buffer[start:end] for start, end in pairwise(ends)
        )
        tables = buffer[self.heading :].reshape(seqs, self.num_blocks)
        return BatchTensors(token_ids, positions, slot_mapping, starts, lengths, tables)


def place(
    chunks: SequenceOf[Chunk], layout: BatchLayout, block_size: int, device: torch.device
) -> tuple[Tensor, BatchTensors[np.ndarray]]:
    """Lay out a batch in host memory, for one copy to the device without waiting for it.

    Padding has token 0 at position 0 without a slot; sequences of padding have no tokens
    and length 0.

    Args:
        layout: at least large enough for the chunks.
        device: the device to which it will be copied.

    Returns:
        The buffer, int64 ``[layout.size]``, and its parts.
    """
    host = transfers.empty_on_host(layout.size, device)
    parts = layout.split(host.numpy())
    _fill(parts, chunks, block_size)
    return host, parts


def _fill(parts: BatchTensors[np.ndarray], chunks: SequenceOf[Chunk], block_size: int) -> None:
    num = len(chunks)
    counts = _integers((len(chunk.token_ids) for chunk in chunks), num)
    begins = _integers((chunk.start for chunk in chunks), num)
    widths = _integers((len(chunk.block_table) for chunk in chunks), num)
    total = int(counts.sum())

    parts.starts[0] = 0
    np.cumsum(counts, out=parts.starts[1 : num + 1])
    parts.starts[num + 1 :] = total
    np.add(begins, counts, out=parts.lengths[:num])
    parts.lengths[num:] = 0

    tables = parts.block_tables
    tables.fill(0)
    known = np.arange(tables.shape[1]) < widths[:, None]
    blocks = chain.from_iterable(chunk.block_table for chunk in chunks)
    tables[:num][known] = _integers(blocks, int(widths.sum()))

    token_ids = chain.from_iterable(chunk.token_ids for chunk in chunks)
    parts.token_ids[:total] = _integers(token_ids, total)
    parts.token_ids[total:] = 0
    owners = np.repeat(np.arange(num), counts)
    positions = np.arange(total) + (begins - parts.starts[:num])[owners]
    parts.positions[:total] = positions
    parts.positions[total:] = 0
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    parts.slot_mapping[:total] = slots
    parts.slot_mapping[total:] = NO_SLOT


def _integers(values: Iterable[int], count: int) -> np.ndarray:
    return np.fromiter(values, np.int64, count)
