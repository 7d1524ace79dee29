"""Attention of decodes over the paged KV cache: a few query tokens against a long context.

Flash-decoding (Dao et al., 2023): the context of a sequence is split over programs, so that
a small batch fills the device as well. The program of a sequence that ends last merges the
splits by their log-sum-exp: a second kernel would cost every layer a launch.
All query heads that share a KV head, and all query tokens of a sequence (several while
drafts are verified), are the rows of one tile: keys and values are read once for them.

The length of a split is decided on the device from the lengths in the batch (`_plan_kernel`),
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minserve.kernels.triton.online_softmax import LOG2_E, softmax_step

MOST_SPLITS = 32
# Tokens in a split, at least: a shorter split costs more to begin and to merge than it saves.
LEAST_SPLIT = 256
# If the host does not know the lengths, which may differ much, up to so many times as many programs
# are launched as the device runs at a time. A program that finds no work costs little, not nothing.
SKEW = 3


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
    num_rows: int, head_dim: int, dtype: torch.dtype, fills_device: bool = True
) -> DecodeTile:
    """Return the tile for so many rows per sequence and KV head.

    Args:
        fills_device: true if there are about as many programs as the device runs at a time.
    """
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    block_n = 64 if head_dim <= 128 else 32
    if dtype is torch.float32:
        return DecodeTile(min(block_m, 32), block_n // 2, num_warps=4, num_stages=2)
    if block_m > 32:
        return DecodeTile(block_m, 32, num_warps=8, num_stages=3)
    # Loads take all the time. More programs at a time are better than more stages, if there are
    # enough programs.
    few_stages = block_m == 16 and fills_device
    return DecodeTile(block_m, block_n, num_warps=4, num_stages=2 if few_stages else 3)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The decodes of an iteration, planned for every layer's `batched_decode`.

    Attributes:
        starts: int64 ``[num_seqs + 1]``: first query token of each sequence, then the end.
        lengths: int64 ``[num_seqs]``: tokens with KV, the query tokens included; 0, with no
            query tokens, for padding.
        tables: int64 ``[num_seqs, max_blocks]``.
        split_len: int64 ``[1]``: tokens of context per split.
        num_splits: upper bound on the splits of the longest sequence.
        most_queries: most query tokens of a sequence.
        partial: float32 ``[num_tokens, num_heads, num_splits, head_dim]``: the splits' outputs;
            empty if there is one split.
        lse: float32 ``[num_tokens, num_heads, num_splits]``: log2 of their sums of exponentials.
        arrived: int32 ``[num_seqs * tiles of a sequence * num_kv_heads]``: number of splits that
            have ended; 0 between launches.
    """

    starts: Tensor
    lengths: Tensor
    tables: Tensor
    split_len: Tensor
    num_splits: int
    most_queries: int
    tile: DecodeTile
    partial: Tensor
    lse: Tensor
    arrived: Tensor

    @property
    def num_seqs(self) -> int:
        return self.lengths.shape[0]


def plan_decodes(
    starts: Tensor,
    lengths: Tensor,
    tables: Tensor,
    *,
    num_tokens: int,
    most_queries: int,
    longest: int,
    total: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_programs: int,
) -> DecodePlan:
    """Decide the splits of a batch. It enqueues work and does not wait for the device.

    Args:
        starts, lengths, tables: as in `DecodePlan`.
        num_tokens: query tokens, at least as many as the sequences have.
        most_queries, longest: bounds on query tokens and length of a sequence.
        total: the sum of the lengths; ``None`` if the host does not know it.
        dtype: dtype of queries and KV.
        num_programs: number of programs that the device runs at a time.
    """
    rows = most_queries * (num_heads // num_kv_heads)
    tile = decode_tile(rows, head_dim, dtype)
    programs_per_seq = num_kv_heads * triton.cdiv(rows, tile.block_m)
    num_pairs = lengths.shape[0] * programs_per_seq
    if total is None:
        num_splits = triton.cdiv(SKEW * num_programs, max(1, num_pairs))
    else:
        # As long as the splits that `_plan_kernel` will find.
        fair = triton.cdiv(total * programs_per_seq, num_programs)
        num_splits = triton.cdiv(longest, _whole_tiles(max(fair, LEAST_SPLIT)))
    num_splits = min(num_splits, max(1, triton.cdiv(longest, LEAST_SPLIT)), MOST_SPLITS)
    tile = decode_tile(rows, head_dim, dtype, 2 * num_pairs * num_splits > num_programs)
    split_len = lengths.new_empty(1)
    shape = (num_tokens, num_heads, num_splits) if num_splits > 1 else (0, 0, 0)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=lengths.device)
    lse = torch.empty(shape, dtype=torch.float32, device=lengths.device)
    num_merged = num_pairs if num_splits > 1 else 0
    arrived = torch.zeros(num_merged, dtype=torch.int32, device=lengths.device)
    _plan_kernel[(1,)](
        lengths,
        split_len,
        lengths.shape[0],
        programs_per_seq,
        num_programs,
        num_splits,
        LEAST_SPLIT=LEAST_SPLIT,
        BLOCK=128,
        num_warps=4,
    )
    return DecodePlan(
        starts, lengths, tables, split_len, num_splits, most_queries, tile, partial, lse, arrived
    )


def _whole_tiles(num_tokens: int) -> int:
    """Return at least ``num_tokens``, as a multiple of any tile's ``block_n``."""
    return triton.cdiv(num_tokens, 64) * 64


def batched_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    plan: DecodePlan,
    scale: float,
) -> None:
    """Attend causally; the last query token of a sequence is its newest token.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``; rows may be strided.
        key_cache, value_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, contiguous.
        out: ``[num_tokens, num_heads, head_dim]``, contiguous; receives the result.
        scale: factor on the scores.
    """
    if plan.num_seqs == 0:
        return
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    tile = plan.tile
    num_tiles = triton.cdiv(plan.most_queries * (num_heads // num_kv_heads), tile.block_m)
    _decode_kernel[(num_kv_heads, plan.num_seqs * num_tiles, plan.num_splits)](
        query,
        key_cache,
        value_cache,
        out,
        plan.partial,
        plan.lse,
        plan.arrived,
        plan.starts,
        plan.lengths,
        plan.tables,
        plan.split_len,
        query.stride(0),
        plan.tables.stride(0),
        num_tiles,
        plan.num_splits,
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        MOST_SPLITS=MOST_SPLITS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


# Values that differ from batch to batch are not specialized: a kernel compiled for each new value
# would stall the requests of that batch. The inputs of a batch lie in one buffer, at any address.
@triton.jit(
    do_not_specialize=[
        "lengths_ptr",
        "num_seqs",
        "programs_per_seq",
        "num_programs",
        "num_splits",
    ]
)
def _plan_kernel(
    lengths_ptr,
    split_len_ptr,
    num_seqs,
    programs_per_seq,
    num_programs,
    num_splits,
    LEAST_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the tokens per split, a multiple of any tile's ``block_n``.

    All of ``num_programs`` programs get about the same number of tokens, unless the longest
    sequence would then have more than ``num_splits`` splits.
    """
    total = tl.zeros([BLOCK], dtype=tl.int64)
    longest = tl.zeros([BLOCK], dtype=tl.int64)
    for first in range(0, num_seqs, BLOCK):
        seqs = first + tl.arange(0, BLOCK)
        lengths = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
        total += lengths
        longest = tl.maximum(longest, lengths)
    fair = tl.cdiv(tl.sum(total, 0) * programs_per_seq, num_programs)
    least = tl.cdiv(tl.max(longest, 0), num_splits)
    split_len = tl.maximum(tl.maximum(fair, least), LEAST_SPLIT)
    tl.store(split_len_ptr, tl.cdiv(split_len, 64) * 64)


@triton.jit(
    do_not_specialize=[
        "starts_ptr",
        "lengths_ptr",
        "tables_ptr",
        "table_stride",
        "num_tiles",
        "num_splits",
    ]
)
def _decode_kernel(
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
    split_len_ptr,
    query_stride,
    table_stride,
    num_tiles,
    num_splits,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Compute one split of a sequence's context, for one KV head and a tile of its queries.

    Row r of a sequence's queries is head ``r % group`` of query token ``r // group``.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    # Splits loaded at a time when they are merged, as many as registers allow.
    UNROLL: tl.constexpr = 4 if BLOCK_M == 16 else 1
    kv_head = tl.program_id(0)
    seq = tl.program_id(1) // num_tiles
    split = tl.program_id(2)
    start = tl.load(starts_ptr + seq)
    num_queries = (tl.load(starts_ptr + seq + 1) - start).to(tl.int32)
    length = tl.load(lengths_ptr + seq).to(tl.int32)
    rows = (tl.program_id(1) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    split_len = tl.load(split_len_ptr).to(tl.int32)
    begin = split * split_len
    end = tl.minimum(length, begin + split_len)
    if begin >= length or tl.min(rows, 0) >= num_queries * GROUP:
        return

    is_row = rows < num_queries * GROUP
    token = start + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    position = length - num_queries + rows // GROUP
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    query = tl.load(
        query_ptr + token[:, None] * query_stride + head[:, None] * HEAD_DIM + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    # The next piece's blocks are looked up while this piece is computed: loads of keys and values
    # that waited for another load of the same loop turn would not be pipelined.
    ahead = begin + tl.arange(0, BLOCK_N)
    next_block = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < end, other=0).to(tl.int32)
    for first in range(begin, end, BLOCK_N):
        context = first + tl.arange(0, BLOCK_N)
        is_there = context < end
        slot = next_block.to(tl.int64) * BLOCK_SIZE + context % BLOCK_SIZE
        ahead = context + BLOCK_N
        next_block = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < end, other=0).to(
            tl.int32
        )
        offset = (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM
        key = tl.load(
            key_ptr + offset[None, :] + dim[:, None],
            mask=is_there[None, :] & is_dim[:, None],
            other=0.0,
        )
        scores = tl.dot(query, key, input_precision="ieee") * scale
        is_seen = is_there[None, :] & (context[None, :] <= position[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        # A row may see nothing of a whole split: drafted tokens at the split's end come after it.
        weights, decay, best, total = softmax_step(scores, best, total, MAY_SEE_NOTHING=True)
        value = tl.load(
            value_ptr + offset[:, None] + dim[None, :],
            mask=is_there[:, None] & is_dim[None, :],
            other=0.0,
        )
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")

    total = tl.where(total > 0.0, total, 1.0)
    acc = acc / total[:, None]
    row = token * NUM_HEADS + head
    is_out = is_row[:, None] & is_dim[None, :]
    out_ptrs = out_ptr + row[:, None] * HEAD_DIM + dim[None, :]
    if end - begin == length:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_out)
        return

    lse_ptrs = lse_ptr + row * num_splits
    partial_ptrs = partial_ptr + (row * num_splits)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(partial_ptrs + split * HEAD_DIM, acc, mask=is_out)
    tl.store(lse_ptrs + split, best + tl.log2(total), mask=is_row)
    # All threads' stores are made before one of them tells the other programs.
    tl.debug_barrier()
    arrived_ptrs = arrived_ptr + tl.program_id(1) * NUM_KV_HEADS + kv_head
    num_used = tl.cdiv(length, split_len)
    if tl.atomic_add(arrived_ptrs, 1, sem="acq_rel") < num_used - 1:
        return
    tl.store(arrived_ptrs, 0)  # for the next layer
    # What other programs wrote is read past the first-level cache, which may hold older values.
    splits = tl.arange(0, MOST_SPLITS)
    all_lse = tl.load(
        lse_ptrs[:, None] + splits[None, :],
        mask=is_row[:, None] & (splits < num_used)[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    best = tl.where(is_row, tl.max(all_lse, 1), 0.0)
    total = tl.where(is_row, tl.sum(tl.exp2(all_lse - best[:, None]), 1), 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for other in tl.range(0, num_used, loop_unroll_factor=UNROLL):
        lse = tl.load(lse_ptrs + other, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        partial = tl.load(
            partial_ptrs + other * HEAD_DIM, mask=is_out, other=0.0, cache_modifier=".cg"
        )
        acc += tl.exp2(lse - best)[:, None] * partial
    acc = acc / total[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_out)
