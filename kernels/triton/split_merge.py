"""The end of a context that was split over programs: the one that ends last merges all splits.

Splits are merged by the log-sum-exp of their scores. A second kernel for that would cost every
layer a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# So many rows of so many splits are merged at a time: each load in turn would cost the latency of
# memory once more, and with more of them fewer programs would run at a time.
MERGED_ROWS, MERGED_SPLITS = 4, 8
ROWS_AT_A_TIME, SPLITS_AT_A_TIME = tl.constexpr(MERGED_ROWS), tl.constexpr(MERGED_SPLITS)


@triton.jit
def ended_last(arrived_ptr, num_splits):
    """Tell the other programs that this one's split is stored; return whether it was the last.

    Args:
        arrived_ptr: the counter of the splits that have ended. It is 0 again after the last one,
            for the next launch.
    """
    # All threads' stores are made before one of them tells the other programs.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        tl.store(arrived_ptr, 0)
    return is_last


@triton.jit
def merge_splits(
    partial_ptr,
    lse_ptr,
    out_ptr,
    split_stride,
    num_splits,
    begin,
    end,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store the attention of the rows in [begin, end), from that of their splits.

    Args:
        partial_ptr: float32 rows of ``HEAD_DIM``: the splits' outputs. Row r of split s is the
            ``r + s * split_stride``-th.
        lse_ptr: float32: log2 of the splits' sums of exponentials, a number for each such row.
        out_ptr: the first head of the first token of ``[num_tokens, NUM_HEADS, HEAD_DIM]``. Row r
            is head ``r % GROUP`` of token ``r // GROUP`` from there on.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    ROWS: tl.constexpr = ROWS_AT_A_TIME
    # Of 128 threads each holds 32 numbers.
    SPLITS: tl.constexpr = min(SPLITS_AT_A_TIME, 4096 // (ROWS * BLOCK_D))
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < end
        best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        for first_split in range(0, num_splits, SPLITS):
            split = first_split + tl.arange(0, SPLITS)
            source = split[:, None] * split_stride + row[None, :]
            is_there = (split < num_splits)[:, None] & is_row[None, :]
            # What other programs wrote is read past the first-level cache, which may hold older
            # values.
            lse = tl.load(
                lse_ptr + source, mask=is_there, other=float("-inf"), cache_modifier=".cg"
            )
            partial = tl.load(
                partial_ptr + source[:, :, None] * HEAD_DIM + dim[None, None, :],
                mask=is_there[:, :, None] & is_dim[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            # A row that sees nothing of the later splits has seen the first token.
            new_best = tl.where(is_row, tl.maximum(best, tl.max(lse, 0)), 0.0)
            weights, decay = tl.exp2(lse - new_best[None, :]), tl.exp2(best - new_best)
            best = new_best
            total = total * decay + tl.sum(weights, 0)
            acc = acc * decay[:, None] + tl.sum(partial * weights[:, :, None], 0)
        acc = acc / tl.where(is_row, total, 1.0)[:, None]
        out_row = (row // GROUP) * NUM_HEADS + row % GROUP
        tl.store(
            out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=is_row[:, None] & is_dim[None, :],
        )
