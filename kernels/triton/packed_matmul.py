"""``x W^T`` for some rows and a weight that stays packed: unpacked in registers, multiplied there.

The product is computed transposed, ``W x^T``: tensor cores take their first operand from registers,
where the unpacked values are. Values minus zeros are whole numbers, or short floats, that 16 bits
hold exactly; scales are applied to the sums of a group in float32. So a result is as exact as with
a weight that was not rounded to 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minserve.kernels.packed_matrix import PackedMatrix
from minserve.kernels.triton.packed_splits import (
    chunks_of_split,
    is_last,
    partial_sums,
    sum_of_splits,
)
from minserve.kernels.triton.packed_values import (
    check_rows,
    constants_of,
    load_scale,
    load_zero,
    stored_values,
)


class MatmulTile(NamedTuple):
    """Shape of one program: rows of ``x``, outputs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def matmul_tile(num_rows: int, dtype: torch.dtype) -> MatmulTile:
    """Return the tile for a product of so many rows."""
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    if dtype is torch.float32:
        return MatmulTile(min(block_m, 32), 32, num_warps=4, num_stages=2)
    # Four warps unpack 16 outputs each; with fewer outputs some would unpack the same.
    return MatmulTile(block_m, 64, num_warps=4, num_stages=3)


@triton.jit(do_not_specialize=["num_rows"])
def _packed_matmul_kernel(
    out,
    x,
    words,
    scale,
    zero,
    bias,
    partial,
    arrived,
    num_rows,
    x_stride,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    PER_WORD: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_OF_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHUNK: tl.constexpr = HEIGHT * PER_WORD
    IS_WHOLE: tl.constexpr = GROUP >= NUM_INPUTS
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_output, is_row = outputs < NUM_OUTPUTS, rows < num_rows
    row_of_words = tl.arange(0, HEIGHT)
    dtype: tl.constexpr = x.dtype.element_ty
    x_rows = x + rows.to(tl.int64)[None, :] * x_stride
    begin = tl.program_id(2) * CHUNKS_OF_SPLIT
    end = tl.minimum(begin + CHUNKS_OF_SPLIT, NUM_CHUNKS)
    first_words = (begin * HEIGHT + row_of_words).to(tl.int64)
    word_ptrs = words + first_words[None, :] * NUM_OUTPUTS + outputs[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for chunk in range(begin, end):
        packed = tl.load(word_ptrs, is_output[:, None], other=0)
        word_ptrs += HEIGHT * NUM_OUTPUTS
        for run in tl.static_range(PER_WORD // RUN):
            group = (chunk * CHUNK + run * RUN * HEIGHT) // GROUP
            where = group * NUM_OUTPUTS + outputs
            part = acc if IS_WHOLE else tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            for slot in tl.static_range(run * RUN, run * RUN + RUN):
                inputs = chunk * CHUNK + slot * HEIGHT + row_of_words
                row = tl.load(
                    x_rows + inputs[:, None],
                    (inputs < NUM_INPUTS)[:, None] & is_row[None, :],
                    other=0.0,
                )
                weight = stored_values(packed, slot, KIND)
                if KIND == "int4" or KIND == "int8":
                    weight -= load_zero(zero, where, is_output, KIND)[:, None]
                part = tl.dot(weight.to(dtype), row, part, input_precision="ieee")
            if IS_WHOLE:
                acc = part
            else:
                acc += part * load_scale(scale, where, is_output, KIND)[:, None]
    if IS_WHOLE:
        acc *= load_scale(scale, outputs, is_output, KIND)[:, None]
    place = rows.to(tl.int64)[None, :] * NUM_OUTPUTS + outputs[:, None]
    is_out = is_output[:, None] & is_row[None, :]
    if SPLITS > 1:
        stride = num_rows.to(tl.int64) * NUM_OUTPUTS
        tl.store(partial + tl.program_id(2) * stride + place, acc, is_out)
        if not is_last(arrived + tl.program_id(0), SPLITS):
            return
        acc = sum_of_splits(partial + place, is_out, stride, SPLITS)
    if bias is not None:
        acc += tl.load(bias + outputs, is_output, other=0.0).to(tl.float32)[:, None]
    tl.store(out + place, acc.to(dtype), is_out)


def packed_matmul(
    x: torch.Tensor,
    matrix: PackedMatrix,
    bias: torch.Tensor | None,
    *,
    capability: int,
    num_sms: int,
) -> torch.Tensor:
    """Return ``x W^T + bias``.

    Args:
        x: ``[rows, in]``, float16, bfloat16 or float32; inputs in the matrix's order, adjacent.
        bias: ``[out]``, of any float dtype.
        capability: the device's compute capability, times ten.
        num_sms: its multiprocessors.

    Returns:
        ``[rows, out]``, of the dtype of ``x``.
    """
    check_rows(x, matrix)
    rows, outputs = x.shape[0], matrix.num_outputs
    out = x.new_empty(rows, outputs)
    if not rows:
        return out
    tile = matmul_tile(rows, x.dtype)
    tiles = triton.cdiv(outputs, tile.block_n), triton.cdiv(rows, tile.block_m)
    # A tile of rows has no counters of its own.
    chunks = matrix.num_chunks
    if tiles[1] == 1:
        chunks = chunks_of_split(matrix, tiles[0], num_sms)
    splits = triton.cdiv(matrix.num_chunks, chunks)
    _packed_matmul_kernel[(*tiles, splits)](
        out,
        x,
        matrix.words,
        matrix.scale,
        matrix.zero,
        bias,
        partial_sums(x, splits, outputs),
        matrix.arrived,
        rows,
        x.stride(0),
        **constants_of(matrix, capability),
        RUN=matrix.run,
        NUM_CHUNKS=matrix.num_chunks,
        CHUNKS_OF_SPLIT=chunks,
        SPLITS=splits,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
