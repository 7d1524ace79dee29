"""``x W^T`` for one row and a weight that stays packed; no tensor cores.

A program has some outputs and all inputs, or a part of them. Its threads multiply and add values as they unpack them;
only at the end are the sums of different rows of words added.
"""

from __future__ import annotations

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

BLOCK_N, NUM_WARPS, NUM_STAGES = 64, 4, 4


@triton.jit
def _packed_gemv_kernel(
    out,
    x,
    words,
    scale,
    zero,
    bias,
    partial,
    arrived,
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
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    CHUNK: tl.constexpr = HEIGHT * PER_WORD
    IS_WHOLE_NUMBER: tl.constexpr = KIND == "int4" or KIND == "int8"
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < NUM_OUTPUTS
    row_of_words = tl.arange(0, HEIGHT)
    begin = tl.program_id(1) * CHUNKS_OF_SPLIT
    end = tl.minimum(begin + CHUNKS_OF_SPLIT, NUM_CHUNKS)
    first_words = (begin * HEIGHT + row_of_words).to(tl.int64)
    word_ptrs = words + first_words[:, None] * NUM_OUTPUTS + outputs[None, :]
    acc = tl.zeros([HEIGHT, BLOCK_N], dtype=tl.float32)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        packed = tl.load(word_ptrs, is_output[None, :], other=0)
        word_ptrs += HEIGHT * NUM_OUTPUTS
        for run in tl.static_range(PER_WORD // RUN):
            group = (chunk * CHUNK + run * RUN * HEIGHT) // GROUP
            where = group * NUM_OUTPUTS + outputs
            part = tl.zeros([HEIGHT, BLOCK_N], dtype=tl.float32)
            total = tl.zeros([HEIGHT], dtype=tl.float32)
            for slot in tl.static_range(run * RUN, run * RUN + RUN):
                inputs = chunk * CHUNK + slot * HEIGHT + row_of_words
                row = tl.load(x + inputs, inputs < NUM_INPUTS, other=0.0).to(tl.float32)
                part += row[:, None] * stored_values(packed, slot, KIND)
                total += row
            if IS_WHOLE_NUMBER:
                # What every value is too large by is taken away once for all slots.
                part -= total[:, None] * load_zero(zero, where, is_output, KIND)[None, :]
            acc += part * load_scale(scale, where, is_output, KIND)[None, :]
    result = tl.sum(acc, axis=0)
    if SPLITS > 1:
        tl.store(partial + tl.program_id(1) * NUM_OUTPUTS + outputs, result, is_output)
        if not is_last(arrived + tl.program_id(0), SPLITS):
            return
        result = sum_of_splits(partial + outputs, is_output, NUM_OUTPUTS, SPLITS)
    if bias is not None:
        result += tl.load(bias + outputs, is_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, result.to(x.dtype.element_ty), is_output)


def packed_gemv(
    x: torch.Tensor,
    matrix: PackedMatrix,
    bias: torch.Tensor | None,
    *,
    capability: int,
    num_sms: int,
) -> torch.Tensor:
    """Return ``x W^T + bias`` for one row; else as `packed_matmul`."""
    check_rows(x, matrix)
    outputs = matrix.num_outputs
    assert len(x) == 1
    out = x.new_empty(1, outputs)
    tiles = triton.cdiv(outputs, BLOCK_N)
    chunks = chunks_of_split(matrix, tiles, num_sms)
    splits = triton.cdiv(matrix.num_chunks, chunks)
    _packed_gemv_kernel[tiles, splits](
        out,
        x,
        matrix.words,
        matrix.scale,
        matrix.zero,
        bias,
        partial_sums(x, splits, outputs),
        matrix.arrived,
        **constants_of(matrix, capability),
        RUN=matrix.run,
        NUM_CHUNKS=matrix.num_chunks,
        CHUNKS_OF_SPLIT=chunks,
        SPLITS=splits,
        BLOCK_N=BLOCK_N,
        STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
    )
    return out
