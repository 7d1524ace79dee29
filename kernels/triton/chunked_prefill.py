"""Attention of prefill chunks over the paged KV cache, all chunks of a batch in one launch.

FlashAttention-2 (Dao, 2023): a program holds a tile of one head's queries and walks over the
context, found through the block table, from the first token to the tile's last query. Context that
every query of the tile may see is not masked; the rest is masked causally.

If tiles are too few to fill the device (a short chunk after a long context), that walk is split
over programs; the program of a tile that ends last merges the splits, as in `batched_decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minserve.kernels.kv_quantization import KVScales
from minserve.kernels.triton.kv_values import LIFT, load_scales
from minserve.kernels.triton.online_softmax import LOG2_E, softmax_step
from minserve.kernels.triton.paged_tiles import blocks_at, slots_in
from minserve.kernels.triton.prefill_tiles import prefill_tiles
from minserve.kernels.triton.split_merge import ended_last, merge_splits
from minserve.kernels.upload import to_device

MOST_SPLITS = 8
# Tokens in a split, at least: a shorter split costs more to begin and to merge than it saves.
LEAST_SPLIT = 512
# If the host does not know the tiles, most of which may be none, up to so many times as many programs
# are launched as the device runs at a time.
SKEW = 3
# A chunk of at most so many tokens is short; from so many on, it fills the device with any tile.
SHORT_CHUNK, LONG_CHUNK = 64, 8192
# Chunk sizes from which on another tile is chosen.
CHUNK_SIZES = (1, SHORT_CHUNK + 1, LONG_CHUNK)


class PrefillTile(NamedTuple):
    """Shape of one program: ``block_m`` queries, and ``block_n`` tokens of context at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_tile(
    longest: int, head_dim: int, dtype: torch.dtype, capability: int, in_8_bits: bool = False
) -> PrefillTile:
    """Return the tile for a batch whose longest chunk has so many tokens.

    Args:
        capability: the device's compute capability, times ten. Below 90, and from 120 on, the
            tensor cores read their operands from registers, so fewer registers are free.
        in_8_bits: true if keys and values are converted, which takes registers too.
    """
    if dtype is torch.float32:
        return PrefillTile(32, 16, num_warps=8, num_stages=2)
    if head_dim > 128:
        return PrefillTile(64, 32, num_warps=8, num_stages=2)
    if 90 <= capability < 120:
        if longest < LONG_CHUNK:
            return PrefillTile(64, 32 if in_8_bits else 64, num_warps=4, num_stages=3)
        return PrefillTile(128, 64, num_warps=8, num_stages=4)
    if longest <= SHORT_CHUNK:
        return PrefillTile(64, 32, num_warps=4, num_stages=3)
    if head_dim > 64:
        return PrefillTile(128, 32, num_warps=8, num_stages=2)
    return PrefillTile(128, 64, num_warps=8, num_stages=3)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The prefill chunks of an iteration, planned for every layer's `chunked_prefill`.

    Attributes:
        tiles: int64 ``[num_tiles, 2]``: the result of `prefill_tiles`, or of
            `prefill_tiles_on_device`.
        split_len: tokens of context per split, a multiple of the tile's ``block_n``.
        num_splits: number of splits of the tile with the most context.
        partial: float32 ``[num_tiles, num_heads, num_splits, block_m, head_dim]``: the splits'
            outputs; empty if there is one split.
        lse: float32 ``[num_tiles, num_heads, num_splits, block_m]``: log2 of their sums of
            exponentials.
        arrived: int32 ``[num_tiles, num_heads]``: number of splits that have ended; 0 between
            launches.
    """

    tile: PrefillTile
    tiles: Tensor
    split_len: int
    num_splits: int
    partial: Tensor
    lse: Tensor
    arrived: Tensor


def plan_prefills(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    first_seq: int,
    *,
    tile: PrefillTile,
    num_heads: int,
    head_dim: int,
    num_programs: int,
    device: torch.device,
    tiles: Tensor | None = None,
) -> PrefillPlan:
    """Decide tiles and splits of a batch. It enqueues work and does not wait for the device.

    Args:
        query_start_loc, seq_lens: as in `AttentionMetadata`.
        first_seq: index of the first sequence that is a prefill chunk.
        num_programs: number of programs that the device runs at a time.
        tiles: the tiles, if the device made them because the host knows bounds alone.
    """
    if tiles is None:
        known = prefill_tiles(query_start_loc, seq_lens, first_seq, tile.block_m)
        tiles = to_device(known, torch.int64, device)
    else:
        num_programs *= SKEW
    num_tiles = len(tiles)
    longest = max(seq_lens[first_seq:], default=1)
    num_splits = max(
        1,
        min(
            num_programs // max(1, num_heads * num_tiles),
            triton.cdiv(longest, LEAST_SPLIT),
            MOST_SPLITS,
        ),
    )
    split_len = triton.cdiv(triton.cdiv(longest, num_splits), tile.block_n) * tile.block_n
    num_splits = triton.cdiv(longest, split_len)
    shape = (num_tiles, num_heads, num_splits, tile.block_m) if num_splits > 1 else (0, 0, 0, 0)
    return PrefillPlan(
        tile,
        tiles,
        split_len,
        num_splits,
        partial=torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
        lse=torch.empty(shape, dtype=torch.float32, device=device),
        arrived=torch.zeros(shape[:2], dtype=torch.int32, device=device),
    )


def chunked_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tables: Tensor,
    plan: PrefillPlan,
    scale: float,
    scales: KVScales | None = None,
) -> None:
    """Attend causally; the last query token of a chunk is the newest token of its sequence.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``; rows may be strided.
        key_cache, value_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, contiguous.
        out: ``[num_tokens, num_heads, head_dim]``, contiguous: the chunks' rows are written.
        starts, lengths, tables: int64, for all sequences of the batch: ``[num_seqs + 1]``,
            ``[num_seqs]``, ``[num_seqs, max_blocks]``.
        scale: factor on the scores.
        scales: those of a cache in 8 bits, contiguous; ``None`` for a cache in the queries' dtype.
    """
    tile, num_tiles = plan.tile, plan.tiles.shape[0]
    if num_tiles == 0:
        return
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    low = 2 ** (head_dim.bit_length() - 1)
    high = max(16, triton.next_power_of_2(head_dim - low)) if head_dim > low else 0
    if scales is not None and high == 32:
        # Converted values of both parts pass through one piece of shared memory. Where they have the
        # same layout there, ptxas 12.8 is right: see `minserve.kernels.triton.assembler`.
        high = 64
    _prefill_kernel[(num_heads, num_tiles, plan.num_splits)](
        query,
        key_cache,
        value_cache,
        out,
        plan.partial,
        plan.lse,
        plan.arrived,
        starts,
        lengths,
        tables,
        plan.tiles,
        None if scales is None else scales.key,
        None if scales is None else scales.value,
        query.stride(0),
        tables.stride(0),
        plan.split_len,
        plan.num_splits,
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        LOW=low,
        HIGH=high,
        SPLIT=plan.num_splits > 1,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


# Values that differ from batch to batch are not specialized: see `batched_decode`.
@triton.jit(
    do_not_specialize=[
        "starts_ptr",
        "lengths_ptr",
        "tables_ptr",
        "table_stride",
        "split_len",
        "num_splits",
    ]
)
def _prefill_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    arrived_ptr,
    starts_ptr,
    lengths_ptr,
    tables_ptr,
    tiles_ptr,
    key_scale_ptr,
    value_scale_ptr,
    query_stride,
    table_stride,
    split_len,
    num_splits,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Compute one tile of one head's queries, over its context or over one split of it.

    A head of 80 or 96 dimensions is computed as its first 64 and its other 16 or 32 dimensions:
    rounded up to one power of two it would cost as much as 128.
    """
    head = tl.program_id(0)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    seq = tl.load(tiles_ptr + 2 * tl.program_id(1))
    if seq < 0:  # no tile
        return
    first = tl.load(tiles_ptr + 2 * tl.program_id(1) + 1).to(tl.int32)
    start = tl.load(starts_ptr + seq)
    num_queries = (tl.load(starts_ptr + seq + 1) - start).to(tl.int32)
    length = tl.load(lengths_ptr + seq).to(tl.int32)

    rows = tl.arange(0, BLOCK_M)
    position = length - num_queries + first + rows
    seen_by_all = length - num_queries + first + 1
    end = tl.minimum(length, seen_by_all + BLOCK_M - 1)
    begin, until = 0, end
    if SPLIT:
        begin = tl.program_id(2) * split_len
        until = tl.minimum(end, begin + split_len)
        if begin >= end:
            return
    until_unmasked = tl.minimum((seen_by_all // BLOCK_N) * BLOCK_N, until)
    until_unmasked = tl.maximum(until_unmasked, begin)

    low = tl.arange(0, LOW)
    high = LOW + tl.arange(0, HIGH if HIGH > 0 else 16)
    is_row = rows < num_queries - first
    query_ptr += (start + first) * query_stride + head * HEAD_DIM
    query_low, query_high = _load_queries(
        query_ptr, rows * query_stride, is_row, low, high, HEAD_DIM, HIGH
    )
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc_low = tl.zeros([BLOCK_M, LOW], dtype=tl.float32)
    acc_high = tl.zeros([BLOCK_M, HIGH if HIGH > 0 else 16], dtype=tl.float32)
    table_ptr = tables_ptr + seq * table_stride
    best, total, acc_low, acc_high = _attend(
        best, total, acc_low, acc_high, query_low, query_high, key_ptr, value_ptr, table_ptr,
        position, low, high, kv_head, begin, until_unmasked, end, scale, key_scale_ptr, value_scale_ptr,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, HIGH, False, False,
    )  # fmt: skip
    best, total, acc_low, acc_high = _attend(
        best, total, acc_low, acc_high, query_low, query_high, key_ptr, value_ptr, table_ptr,
        position, low, high, kv_head, until_unmasked, until, end, scale, key_scale_ptr, value_scale_ptr,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, HIGH, True, SPLIT,
    )  # fmt: skip

    if value_scale_ptr is not None:
        acc_low, acc_high = acc_low / LIFT, acc_high / LIFT
    out_ptr += ((start + first) * NUM_HEADS + head) * HEAD_DIM
    if SPLIT:
        _store_split(
            out_ptr, partial_ptr, lse_ptr, arrived_ptr + tl.program_id(1) * NUM_HEADS + head,
            best, total, acc_low, acc_high, low, high, num_queries - first, num_splits,
            tl.cdiv(end, split_len), head, NUM_HEADS, HEAD_DIM, BLOCK_M, HIGH,
        )  # fmt: skip
    else:
        acc_low, acc_high = acc_low / total[:, None], acc_high / total[:, None]
        row_offsets = rows * (NUM_HEADS * HEAD_DIM)
        _store_rows(out_ptr, row_offsets, acc_low, acc_high, is_row, low, high, HEAD_DIM, HIGH)


@triton.jit
def _load_queries(ptr, row_offsets, is_row, low, high, HEAD_DIM: tl.constexpr, HIGH: tl.constexpr):
    """Return the rows' first dimensions, and the others; the former twice if there are no others."""
    ptrs = ptr + row_offsets[:, None]
    part_low = tl.load(ptrs + low[None, :], mask=is_row[:, None], other=0.0)
    part_high = part_low
    if HIGH > 0:
        is_there = is_row[:, None] & (high < HEAD_DIM)[None, :]
        part_high = tl.load(ptrs + high[None, :], mask=is_there, other=0.0)
    return part_low, part_high


@triton.jit
def _store_rows(
    ptr,
    row_offsets,
    part_low,
    part_high,
    is_row,
    low,
    high,
    HEAD_DIM: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Store rows of ``HEAD_DIM`` values, their first dimensions and the others."""
    ptrs = ptr + row_offsets[:, None]
    part_low = part_low.to(ptr.dtype.element_ty)
    tl.store(ptrs + low[None, :], part_low, mask=is_row[:, None])
    if HIGH > 0:
        is_there = is_row[:, None] & (high < HEAD_DIM)[None, :]
        part_high = part_high.to(ptr.dtype.element_ty)
        tl.store(ptrs + high[None, :], part_high, mask=is_there)


@triton.jit
def _store_split(
    out_ptr,
    partial_ptr,
    lse_ptr,
    arrived_ptr,
    best,
    total,
    acc_low,
    acc_high,
    low,
    high,
    num_rows,
    num_splits,
    num_used,
    head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Store a split's attention; merge the tile's splits if it ended last.

    Args:
        out_ptr: the head's part of the tile's first token.
        best, total, acc_low, acc_high: what `_attend` returned at the split's end.
        num_rows: query tokens of the sequence from the tile's first one on.
        num_used: number of splits of this tile, of ``num_splits`` that there is room for.
    """
    STRIDE: tl.constexpr = NUM_HEADS * HEAD_DIM
    total = tl.where(total > 0.0, total, 1.0)
    acc_low, acc_high = acc_low / total[:, None], acc_high / total[:, None]
    row = tl.arange(0, BLOCK_M)
    num_rows = tl.minimum(num_rows, BLOCK_M)
    if num_used == 1:
        _store_rows(
            out_ptr, row * STRIDE, acc_low, acc_high, row < num_rows, low, high, HEAD_DIM, HIGH
        )
    else:
        place = (tl.program_id(1) * NUM_HEADS + head).to(tl.int64) * num_splits * BLOCK_M
        partial_ptr += place * HEAD_DIM
        lse_ptr += place
        split_row = tl.program_id(2) * BLOCK_M + row
        _store_rows(
            partial_ptr, split_row * HEAD_DIM, acc_low, acc_high, row < num_rows, low, high,
            HEAD_DIM, HIGH,
        )  # fmt: skip
        tl.store(lse_ptr + split_row, best + tl.log2(total))
        if ended_last(arrived_ptr, num_used):
            merge_splits(
                partial_ptr, lse_ptr, out_ptr, BLOCK_M, num_used, 0, num_rows, NUM_HEADS, 1,
                HEAD_DIM,
            )  # fmt: skip


@triton.jit
def _attend(
    best,
    total,
    acc_low,
    acc_high,
    query_low,
    query_high,
    key_ptr,
    value_ptr,
    table_ptr,
    position,
    low,
    high,
    kv_head,
    begin,
    until,
    end,
    scale,
    key_scale_ptr,
    value_scale_ptr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIGH: tl.constexpr,
    MASKED: tl.constexpr,
    MAY_SEE_NOTHING: tl.constexpr,
):
    """Continue over the context in [begin, until); masked if some row may not see all of it.

    A walk from the context's beginning has seen a token in every row after its first piece, so
    that `best` is finite from then on. In a later split a row may see nothing.
    """
    is_high = high < HEAD_DIM
    next_blocks = blocks_at(table_ptr, begin, end, BLOCK_N, BLOCK_SIZE)
    for first in range(begin, until, BLOCK_N):
        context = first + tl.arange(0, BLOCK_N)
        is_there = context < end
        slot = slots_in(next_blocks, first, BLOCK_N, BLOCK_SIZE)
        next_blocks = blocks_at(table_ptr, first + BLOCK_N, end, BLOCK_N, BLOCK_SIZE)
        offset = (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM
        key_ptrs, value_ptrs = key_ptr + offset[None, :], value_ptr + offset[:, None]
        key = _load(key_ptrs + low[:, None], is_there[None, :], MASKED)
        scores = tl.dot(query_low, key.to(query_low.dtype), input_precision="ieee")
        if HIGH > 0:
            is_key = is_there[None, :] & is_high[:, None]
            key_high = tl.load(key_ptrs + high[:, None], mask=is_key, other=0.0)
            key_high = key_high.to(query_low.dtype)
            scores = tl.dot(query_high, key_high, scores, input_precision="ieee")
        if key_scale_ptr is not None:
            scores *= load_scales(key_scale_ptr, slot, kv_head, is_there, NUM_KV_HEADS, BLOCK_SIZE)[
                None, :
            ]
        if MASKED:
            is_seen = is_there[None, :] & (context[None, :] <= position[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
        weights, decay, best, total = softmax_step(scores, scale, best, total, MAY_SEE_NOTHING)
        value = _load(value_ptrs + low[None, :], is_there[:, None], MASKED)
        if value_scale_ptr is not None:
            value_scale = load_scales(
                value_scale_ptr, slot, kv_head, is_there, NUM_KV_HEADS, BLOCK_SIZE
            )
            weights *= (value_scale * LIFT)[None, :]
        weights, value = weights.to(query_low.dtype), value.to(query_low.dtype)
        acc_low = tl.dot(weights, value, acc_low * decay[:, None], input_precision="ieee")
        if HIGH > 0:
            is_value = is_there[:, None] & is_high[None, :]
            value_high = tl.load(value_ptrs + high[None, :], mask=is_value, other=0.0)
            value_high = value_high.to(query_low.dtype)
            acc_high = tl.dot(
                weights, value_high, acc_high * decay[:, None], input_precision="ieee"
            )
    return best, total, acc_low, acc_high


@triton.jit
def _load(ptrs, mask, MASKED: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=0.0) if MASKED else tl.load(ptrs)
