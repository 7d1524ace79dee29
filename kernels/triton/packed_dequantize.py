"""Unpack a packed weight into memory, for products of so many rows that this costs less."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minserve.kernels.packed_matrix import PackedMatrix
from minserve.kernels.triton.packed_values import (
    constants_of,
    load_scale,
    load_zero,
    stored_values,
)

BLOCK_N, NUM_WARPS = 128, 4


@triton.jit
def _packed_dequantize_kernel(
    out,
    words,
    scale,
    zero,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    PER_WORD: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    chunk = tl.program_id(1)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_of_words = tl.arange(0, HEIGHT)
    is_output = outputs < NUM_OUTPUTS
    first = (chunk * HEIGHT + row_of_words).to(tl.int64) * NUM_OUTPUTS
    packed = tl.load(words + first[:, None] + outputs[None, :], is_output[None, :], other=0)
    for slot in tl.static_range(PER_WORD):
        inputs = (chunk * PER_WORD + slot) * HEIGHT + row_of_words
        where = (chunk * PER_WORD + slot) * HEIGHT // GROUP * NUM_OUTPUTS + outputs
        weight = stored_values(packed, slot, KIND)
        if KIND == "int4" or KIND == "int8":
            weight -= load_zero(zero, where, is_output, KIND)[None, :]
        weight *= load_scale(scale, where, is_output, KIND)[None, :]
        out_ptrs = out + inputs.to(tl.int64)[:, None] * NUM_OUTPUTS + outputs[None, :]
        is_out = (inputs < NUM_INPUTS)[:, None] & is_output[None, :]
        tl.store(out_ptrs, weight.to(out.dtype.element_ty), is_out)


def packed_dequantize(matrix: PackedMatrix, dtype: torch.dtype, *, capability: int) -> torch.Tensor:
    """Return the weight turned over, ``[in, out]``, its inputs in the matrix's own order.

    Args:
        capability: the device's compute capability, times ten.
    """
    outputs = matrix.num_outputs
    out = torch.empty(matrix.num_inputs, outputs, dtype=dtype, device=matrix.words.device)
    chunks = matrix.words.shape[0] // matrix.height
    _packed_dequantize_kernel[triton.cdiv(outputs, BLOCK_N), chunks](
        out,
        matrix.words,
        matrix.scale,
        matrix.zero,
        **constants_of(matrix, capability),
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    return out
