"""Who computes what of a batch of decodes: a list of pieces of the sequences' contexts.

A program for each sequence would leave most of a device idle in a small batch, or beside one very
long sequence. So long contexts are split into pieces of about the length at which all programs
that run at a time would have the same work. The list is made on the device, from the lengths in
the batch (`_plan_kernel`): in a CUDA graph the host does not know them. How many pieces there
are at most it knows all the same, since they are long enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minserve.kernels.triton.split_merge import MERGED_ROWS, MERGED_SPLITS

# Tokens of a piece, at least: a shorter one costs more to begin and to merge than it saves.
LEAST_SPLIT = 256
# The same for a batch whose pieces are so few that each sequence's are merged at once.
FEW_PIECES_SPLIT = 128
# Contexts of at most so many tokens are one piece: the first split costs more than the next ones.
UNSPLIT = 256
# The numbers of a piece; `_store_pieces` has their meaning.
NUM_FIELDS = 8
FIELDS = tl.constexpr(NUM_FIELDS)


class DecodeTile(NamedTuple):
    """Shape of one program.

    Attributes:
        block_m: rows, which are query tokens x heads of a group.
        block_n: tokens of context at a time.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def decode_tile(
    num_rows: int,
    head_dim: int,
    dtype: torch.dtype,
    fills_device: bool = True,
    in_8_bits: bool = False,
) -> DecodeTile:
    """Return the tile for so many rows per sequence and KV head.

    Args:
        fills_device: true if there are about as many programs as the device runs at a time.
        in_8_bits: true if the cache is; ``dtype`` is that of the queries.
    """
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    block_n = 64 if head_dim <= 128 else 32
    if in_8_bits and block_m == 16 and head_dim <= 128 and head_dim.bit_count() == 1:
        # As many bytes are loaded at a time as in 16 bits; heads of other dimensions would spill.
        block_n = 128
    if dtype is torch.float32:
        return DecodeTile(min(block_m, 32), 16, num_warps=8, num_stages=2)
    if block_m > 32:
        return DecodeTile(block_m, 32, num_warps=8, num_stages=3)
    # Loads take all the time. More programs at a time are better than more stages, if there are
    # enough programs; but the widest heads in 8 bits would spill then.
    spills = in_8_bits and head_dim > 128
    few_stages = block_m == 16 and fills_device and not spills
    return DecodeTile(block_m, block_n, num_warps=4, num_stages=2 if few_stages else 3)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The decodes of an iteration, planned for every layer's `batched_decode`.

    Attributes:
        tables: int64 ``[num_seqs, max_blocks]``.
        pieces: int32 ``[most pieces, 8]``; those of split sequences come first, then long ones.
        most_rows: most rows of a sequence and KV head: query tokens x heads of a group.
        partial: float32 ``[most pieces of split sequences, num_kv_heads, most_rows, head_dim]``:
            the outputs of such pieces.
        lse: float32 of its first three sizes: log2 of their sums of exponentials.
        arrived: int32 ``[most pieces of split sequences, num_tiles, num_kv_heads]``: the number of
            pieces of a sequence that have ended, at its first piece; 0 between launches.
    """

    tables: Tensor
    pieces: Tensor
    most_rows: int
    tile: DecodeTile
    partial: Tensor
    lse: Tensor
    arrived: Tensor

    @property
    def num_tiles(self) -> int:
        """The number of tiles that the rows of a sequence and KV head take."""
        return triton.cdiv(self.most_rows, self.tile.block_m)


def plan_decodes(
    starts: Tensor,
    lengths: Tensor,
    tables: Tensor,
    *,
    most_queries: int,
    longest: int,
    total: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_programs: int,
    in_8_bits: bool = False,
) -> DecodePlan:
    """Decide the pieces of a batch. It enqueues work and does not wait for the device.

    Args:
        starts: int64 ``[num_seqs + 1]``: first query token of each sequence, then the end.
        lengths: int64 ``[num_seqs]``: tokens with KV, the query tokens included; 0, with no
            query tokens, for padding.
        tables: as in `DecodePlan`.
        most_queries, longest: bounds on query tokens and length of a sequence.
        total: the sum of the lengths; ``None`` if the host does not know it.
        dtype: dtype of queries, and of KV that is not in 8 bits.
        num_programs: number of programs that the device runs at a time.
        in_8_bits: true if the KV is.
    """
    num_seqs, rows = lengths.shape[0], most_queries * (num_heads // num_kv_heads)
    tile = decode_tile(rows, head_dim, dtype)
    num_tiles = triton.cdiv(rows, tile.block_m)
    programs_per_piece = max(1, num_kv_heads * num_tiles)
    at_a_time = max(1, num_programs // programs_per_piece)
    few = MERGED_SPLITS // max(1, triton.cdiv(min(rows, tile.block_m), MERGED_ROWS))
    more = _most_splits(num_seqs, longest, total, at_a_time, few, tile.block_n)
    sure = num_seqs + (0 if total is None else more)
    tile = decode_tile(rows, head_dim, dtype, 2 * sure > at_a_time, in_8_bits)
    device = lengths.device
    pieces = torch.empty((num_seqs + more, NUM_FIELDS), dtype=torch.int32, device=device)
    # A sequence of n pieces has n - 1 splits, and n is at most twice that.
    shape = (min(num_seqs + more, 2 * more), num_kv_heads, rows)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    arrived = torch.zeros((shape[0], num_tiles, num_kv_heads), dtype=torch.int32, device=device)
    _plan_kernel[(1,)](
        starts,
        lengths,
        pieces,
        num_seqs,
        pieces.shape[0],
        at_a_time,
        few,
        LEAST_SPLIT=LEAST_SPLIT,
        FEW_PIECES_SPLIT=FEW_PIECES_SPLIT,
        UNSPLIT=UNSPLIT,
        BLOCK_N=tile.block_n,
        BLOCK=128,
        num_warps=4,
    )
    return DecodePlan(tables, pieces, rows, tile, partial, lse, arrived)


def _most_splits(
    num_seqs: int, longest: int, total: int | None, at_a_time: int, few: int, block_n: int
) -> int:
    """Return how often `_plan_kernel` splits the contexts of a batch at most, all together."""
    if longest <= UNSPLIT:
        return 0
    if total is None:
        return min(2 * at_a_time, max(few, num_seqs * longest // LEAST_SPLIT))
    least = FEW_PIECES_SPLIT if triton.cdiv(total, FEW_PIECES_SPLIT) <= few else LEAST_SPLIT

    def whole_tiles(num_tokens: int) -> int:
        return triton.cdiv(max(num_tokens, least), block_n) * block_n

    split_len = whole_tiles(triton.cdiv(total, at_a_time))
    if longest <= split_len and num_seqs <= at_a_time:
        return 0
    half = whole_tiles(split_len // 2)
    return total // half if longest > half else 0


# Values that differ from batch to batch are not specialized: a kernel compiled for each new value
# would stall the requests of that batch. The inputs of a batch lie in one buffer, at any address.
@triton.jit(
    do_not_specialize=["starts_ptr", "lengths_ptr", "num_seqs", "num_pieces", "at_a_time", "few"]
)
def _plan_kernel(
    starts_ptr,
    lengths_ptr,
    pieces_ptr,
    num_seqs,
    num_pieces,
    at_a_time,
    few,
    LEAST_SPLIT: tl.constexpr,
    FEW_PIECES_SPLIT: tl.constexpr,
    UNSPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the pieces, the longest first, so that no long one is left over at the end.

    Args:
        at_a_time: number of pieces that the device computes at a time.
        few: number of pieces up to which they may be as short as ``FEW_PIECES_SPLIT``.
    """
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for first in range(0, num_seqs, BLOCK):
        seqs = first + tl.arange(0, BLOCK)
        total += tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
    whole = tl.sum(total, 0)
    least = tl.where(tl.cdiv(whole, FEW_PIECES_SPLIT) <= few, FEW_PIECES_SPLIT, LEAST_SPLIT)
    split_len = tl.cdiv(whole, at_a_time).to(tl.int32)
    split_len = tl.cdiv(tl.maximum(split_len, least), BLOCK_N) * BLOCK_N
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, num_seqs, BLOCK):
        seqs = first + tl.arange(0, BLOCK)
        length = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0).to(tl.int32)
        count += _cut(length, split_len, UNSPLIT, BLOCK_N)[0]
    if tl.sum(count, 0) > at_a_time:
        split_len = tl.cdiv(tl.maximum(split_len // 2, least), BLOCK_N) * BLOCK_N

    used = 0
    # Five turns: sequences that are split, then the others, by quarters of that length.
    for turn in range(0, 5):
        for first in range(0, num_seqs, BLOCK):
            seqs = first + tl.arange(0, BLOCK)
            length = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0).to(tl.int32)
            pieces, piece_len = _cut(length, split_len, UNSPLIT, BLOCK_N)
            quarter = tl.minimum(4 * length // split_len, 3)
            is_now = tl.where(pieces > 1, 0, 4 - quarter) == turn
            pieces = tl.where(is_now, pieces, 0)
            place = used + tl.cumsum(pieces, 0) - pieces
            _store_pieces(pieces_ptr, place, starts_ptr, seqs, length, pieces, piece_len)
            used += tl.sum(pieces, 0)
    for first in range(used, num_pieces, BLOCK):
        unused = first + tl.arange(0, BLOCK)
        tl.store(pieces_ptr + unused * FIELDS + 4, 0, mask=unused < num_pieces)
        tl.store(pieces_ptr + unused * FIELDS + 5, 0, mask=unused < num_pieces)


@triton.jit
def _cut(length, split_len, UNSPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the number of pieces of each context, and their length; a last one may be shorter."""
    is_split = length > tl.maximum(split_len, UNSPLIT)
    pieces = tl.where(is_split, tl.cdiv(length, split_len), 1)
    piece_len = tl.maximum(tl.cdiv(tl.cdiv(length, pieces), BLOCK_N), 1) * BLOCK_N
    return tl.cdiv(length, piece_len), piece_len


@triton.jit
def _store_pieces(pieces_ptr, place, starts_ptr, seqs, length, pieces, piece_len):
    """Store the pieces of several sequences, each sequence's from ``place`` on.

    Args:
        place, seqs, length, pieces, piece_len: ``[sequences]``; ``pieces`` is the number of them.
    """
    SPLITS: tl.constexpr = 8
    start = tl.load(starts_ptr + seqs, mask=pieces > 0, other=0).to(tl.int32)
    end = tl.load(starts_ptr + seqs + 1, mask=pieces > 0, other=0).to(tl.int32)
    for first in range(0, tl.max(pieces, 0), SPLITS):
        split = first + tl.arange(0, SPLITS)[None, :]
        is_there = split < pieces[:, None]
        ptrs = pieces_ptr + (place[:, None] + split) * FIELDS
        begin = split * piece_len[:, None]
        none = tl.zeros_like(begin)
        tl.store(ptrs, none + seqs[:, None], mask=is_there)
        tl.store(ptrs + 1, none + start[:, None], mask=is_there)
        tl.store(ptrs + 2, none + (end - start)[:, None], mask=is_there)
        tl.store(ptrs + 3, none + length[:, None], mask=is_there)
        tl.store(ptrs + 4, begin, mask=is_there)  # the piece: [begin, end) of the context
        tl.store(ptrs + 5, tl.minimum(begin + piece_len[:, None], length[:, None]), mask=is_there)
        tl.store(ptrs + 6, none + split, mask=is_there)  # how many pieces of it come before
        tl.store(ptrs + 7, none + pieces[:, None], mask=is_there)
