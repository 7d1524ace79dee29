"""How kernels take values out of the words of a `PackedMatrix`.

Whole numbers become floats without a conversion, which costs more than other instructions: their
bits are put at the top of the mantissa of a power of two. What comes out is the value plus that
power (`OFFSET`), which is taken away together with the zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from minserve.kernels.packed_matrix import PackedMatrix, ValueKind

# Compute capability, times ten, from which on a GPU converts e4m3 itself.
CONVERTS_FP8 = 89


@triton.jit
def stored_values(words, SLOT: tl.constexpr, KIND: tl.constexpr):
    """Return the values in the ``SLOT``-th bits of words in float32, shifted by `value_offset`.

    Args:
        KIND: ``int4``, ``int8``, ``fp8``, or ``fp8-by-bits`` for GPUs that do not convert it: those
            values are 256 times too small.
    """
    # One return: Triton compiles what stands after a return in a branch.
    if KIND == "int4":
        # 16 + value, which has four bits of mantissa after the first.
        LEFT: tl.constexpr = 19 - 4 * SLOT
        bits = (words << LEFT) if LEFT >= 0 else (words >> -LEFT)
        values = ((bits & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)
    elif KIND == "int8":
        # 256 + value
        UP: tl.constexpr = 15 - 8 * SLOT
        bits = (words << UP) if UP >= 0 else (words >> -UP)
        values = ((bits & 0x007F8000) | 0x43800000).to(tl.float32, bitcast=True)
    elif KIND == "fp8":
        octets = ((words >> (8 * SLOT)) & 0xFF).to(tl.uint8)
        values = octets.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    else:
        # float16 has the same bits of mantissa, and a bias of the exponent that is greater by 8.
        octets = words >> (8 * SLOT)
        halves = ((octets & 0x80) << 8) | ((octets & 0x7F) << 7)
        values = halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return values


@triton.jit
def load_zero(zero, where, mask, KIND: tl.constexpr):
    """Return what is to be taken from `stored_values` of these groups and outputs, in float32."""
    OFFSET: tl.constexpr = 16.0 if KIND == "int4" else 256.0
    MIDDLE: tl.constexpr = 8.0 if KIND == "int4" else 128.0
    if zero is None:
        loaded = tl.full(where.shape, MIDDLE, dtype=tl.float32)
    else:
        loaded = tl.load(zero + where, mask, other=0).to(tl.float32)
    return loaded + OFFSET


@triton.jit
def load_scale(scale, where, mask, KIND: tl.constexpr):
    """Return the scales of these groups and outputs in float32."""
    loaded = tl.load(scale + where, mask, other=0.0).to(tl.float32)
    return loaded * 256.0 if KIND == "fp8-by-bits" else loaded


def constants_of(matrix: PackedMatrix, capability: int) -> dict[str, Any]:
    """Return the constants by which a kernel finds a matrix's values in its words.

    Args:
        capability: the GPU's compute capability, times ten.
    """
    by_bits = matrix.kind is ValueKind.FP8 and capability < CONVERTS_FP8
    return {
        "NUM_INPUTS": matrix.num_inputs,
        "NUM_OUTPUTS": matrix.num_outputs,
        "GROUP": matrix.group,
        "HEIGHT": matrix.height,
        "PER_WORD": matrix.per_word,
        "KIND": "fp8-by-bits" if by_bits else matrix.kind.value,
    }


def check_rows(x: torch.Tensor, matrix: PackedMatrix) -> None:
    """Assert that a kernel may multiply rows by a matrix."""
    assert x.shape[1:] == (matrix.num_inputs,)
    assert x.stride(1) == 1
