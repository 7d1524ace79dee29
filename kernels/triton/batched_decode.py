"""Attention of decodes over the paged KV cache: a few query tokens against a long context.

Flash-decoding (Dao et al., 2023): long contexts are split into pieces, one for a program, so that a
small batch fills the device as well. The program of a sequence that ends last merges its pieces.
All query heads that share a KV head, and all query tokens of a sequence (several while
drafts are verified), are the rows of one tile: keys and values are read once for them.

The pieces are those of a `DecodePlan`, a list that is made on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minserve.kernels.kv_quantization import KVScales
from minserve.kernels.triton.decode_plan import FIELDS, DecodePlan
from minserve.kernels.triton.kv_values import LIFT, load_scales
from minserve.kernels.triton.online_softmax import LOG2_E, softmax_step
from minserve.kernels.triton.paged_tiles import blocks_at, slots_in
from minserve.kernels.triton.split_merge import ended_last, merge_splits


def batched_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    plan: DecodePlan,
    scale: float,
    scales: KVScales | None = None,
) -> None:
    """Attend causally; the last query token of a sequence is its newest token.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``; rows may be strided.
        key_cache, value_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, contiguous.
        out: ``[num_tokens, num_heads, head_dim]``, contiguous; receives the result.
        scale: factor on the scores, above 0.
        scales: those of a cache in 8 bits, contiguous; ``None`` for a cache in the queries' dtype.
    """
    if plan.pieces.shape[0] == 0:
        return
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    tile = plan.tile
    _decode_kernel[(num_kv_heads, plan.pieces.shape[0] * plan.num_tiles)](
        query,
        key_cache,
        value_cache,
        out,
        plan.partial,
        plan.lse,
        plan.arrived,
        plan.pieces,
        plan.tables,
        None if scales is None else scales.key,
        None if scales is None else scales.value,
        query.stride(0),
        plan.tables.stride(0),
        plan.num_tiles,
        plan.most_rows,
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


# Values that differ from batch to batch are not specialized: see `decode_plan`.
@triton.jit(do_not_specialize=["tables_ptr", "table_stride", "num_tiles", "most_rows"])
def _decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    arrived_ptr,
    pieces_ptr,
    tables_ptr,
    key_scale_ptr,
    value_scale_ptr,
    query_stride,
    table_stride,
    num_tiles,
    most_rows,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one piece of a sequence's context, for one KV head and a tile of its queries.

    Row r of a sequence's queries is head ``r % GROUP`` of query token ``r // GROUP``.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0)
    piece = tl.program_id(1) // num_tiles
    row_tile = tl.program_id(1) % num_tiles
    # One line of memory has all of a piece: it is the first of the loads that wait for each other.
    piece_ptr = pieces_ptr + piece * FIELDS
    seq, start = tl.load(piece_ptr), tl.load(piece_ptr + 1)
    num_queries, length = tl.load(piece_ptr + 2), tl.load(piece_ptr + 3)
    begin, end = tl.load(piece_ptr + 4), tl.load(piece_ptr + 5)
    num_rows = num_queries * GROUP
    if begin >= end or row_tile * BLOCK_M >= num_rows:
        return

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    query_ptr += start.to(tl.int64) * query_stride + kv_head * GROUP * HEAD_DIM
    acc, lse = _attend_piece(
        query_ptr, key_ptr, value_ptr, tables_ptr + seq.to(tl.int64) * table_stride,
        (rows // GROUP) * query_stride + (rows % GROUP) * HEAD_DIM, is_row, kv_head,
        length - num_queries + rows // GROUP, begin, end, scale, key_scale_ptr, value_scale_ptr,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
    )  # fmt: skip
    _store_piece(
        out_ptr, partial_ptr, lse_ptr, arrived_ptr, piece_ptr, acc, lse, piece, row_tile, kv_head,
        num_tiles, most_rows, GROUP, NUM_KV_HEADS, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _store_piece(
    out_ptr,
    partial_ptr,
    lse_ptr,
    arrived_ptr,
    piece_ptr,
    acc,
    lse,
    piece,
    row_tile,
    kv_head,
    num_tiles,
    most_rows,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store the attention of a tile's rows; merge the pieces of its sequence if it ended last.

    Args:
        acc, lse: the result of `_attend_piece`.
    """
    NUM_HEADS: tl.constexpr = GROUP * NUM_KV_HEADS
    BLOCK_M: tl.constexpr = lse.shape[0]
    # Loaded once more: kept from before, they would take registers from the loop.
    start, num_queries = tl.load(piece_ptr + 1), tl.load(piece_ptr + 2)
    split, num_splits = tl.load(piece_ptr + 6), tl.load(piece_ptr + 7)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.minimum(num_queries * GROUP, (row_tile + 1) * BLOCK_M)
    is_row = rows < end
    out_ptr += (start.to(tl.int64) * NUM_HEADS + kv_head * GROUP) * HEAD_DIM
    if num_splits == 1:
        _store_rows(out_ptr, (rows // GROUP) * NUM_HEADS + rows % GROUP, acc, is_row, HEAD_DIM)
    else:
        first_piece = piece - split
        place = (first_piece.to(tl.int64) * NUM_KV_HEADS + kv_head) * most_rows
        partial_ptr += place * HEAD_DIM
        lse_ptr += place
        stride = NUM_KV_HEADS * most_rows
        _store_rows(partial_ptr, split * stride + rows, acc, is_row, HEAD_DIM)
        tl.store(lse_ptr + split * stride + rows, lse, mask=is_row)
        counter = (first_piece * num_tiles + row_tile) * NUM_KV_HEADS + kv_head
        if ended_last(arrived_ptr + counter, num_splits):
            merge_splits(
                partial_ptr, lse_ptr, out_ptr, stride, num_splits, row_tile * BLOCK_M, end,
                NUM_HEADS, GROUP, HEAD_DIM,
            )  # fmt: skip


@triton.jit
def _attend_piece(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    query_offsets,
    is_row,
    kv_head,
    position,
    begin,
    end,
    scale,
    key_scale_ptr,
    value_scale_ptr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the rows' attention over the context in [begin, end), and log2 of its sums.

    Args:
        query_offsets: where each row's query begins, from ``query_ptr`` on.
        position: the place of each row's query token in the context.
    """
    BLOCK_M: tl.constexpr = is_row.shape[0]
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    query = tl.load(
        query_ptr + query_offsets[:, None] + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    next_blocks = blocks_at(table_ptr, begin, end, BLOCK_N, BLOCK_SIZE)
    for first in range(begin, end, BLOCK_N):
        context = first + tl.arange(0, BLOCK_N)
        is_there = context < end
        slot = slots_in(next_blocks, first, BLOCK_N, BLOCK_SIZE)
        next_blocks = blocks_at(table_ptr, first + BLOCK_N, end, BLOCK_N, BLOCK_SIZE)
        offset = (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM
        key = tl.load(
            key_ptr + offset[None, :] + dim[:, None],
            mask=is_there[None, :] & is_dim[:, None],
            other=0.0,
        )
        scores = tl.dot(query, key.to(query.dtype), input_precision="ieee")
        if key_scale_ptr is not None:
            scores *= load_scales(key_scale_ptr, slot, kv_head, is_there, NUM_KV_HEADS, BLOCK_SIZE)[
                None, :
            ]
        is_seen = is_there[None, :] & (context[None, :] <= position[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        # A row may see nothing of a whole piece: drafted tokens at its end come after it.
        weights, decay, best, total = softmax_step(scores, scale, best, total, MAY_SEE_NOTHING=True)
        value = tl.load(
            value_ptr + offset[:, None] + dim[None, :],
            mask=is_there[:, None] & is_dim[None, :],
            other=0.0,
        )
        acc = acc * decay[:, None]
        if value_scale_ptr is not None:
            value_scale = load_scales(
                value_scale_ptr, slot, kv_head, is_there, NUM_KV_HEADS, BLOCK_SIZE
            )
            weights *= (value_scale * LIFT)[None, :]
        weights, value = weights.to(query.dtype), value.to(query.dtype)
        acc = tl.dot(weights, value, acc, input_precision="ieee")
    total = tl.where(total > 0.0, total, 1.0)
    if value_scale_ptr is not None:
        acc /= LIFT
    return acc / total[:, None], best + tl.log2(total)


@triton.jit
def _store_rows(ptr, rows, values, is_row, HEAD_DIM: tl.constexpr):
    """Store values ``[rows, dims]`` as the rows of a tensor of ``HEAD_DIM`` columns."""
    dim = tl.arange(0, values.shape[1])
    tl.store(
        ptr + rows[:, None] * HEAD_DIM + dim[None, :],
        values.to(ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
    )
