"""The gate of a SwiGLU MLP (Shazeer, 2020): ``silu(gate) * up``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Eight elements per thread: one load of 16 bytes in half precision.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _silu_mul_kernel(out, gate_up, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = out.dtype.element_ty
    gates = gate_up + token * (2 * SIZE)
    gate = tl.load(gates + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(gates + SIZE + columns, mask, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + token * SIZE + columns, (silu * up).to(dtype), mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``, where the rows of ``gate_up`` hold gate, then up.

    It is computed in float32 and rounded where the torch form rounds: silu and the product.

    Args:
        gate_up: ``[tokens, 2 * n]``, contiguous, float16, bfloat16 or float32.

    Returns:
        ``[tokens, n]``.
    """
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(tokens, size)
    if tokens:
        grid = (tokens, triton.cdiv(size, BLOCK))
        _silu_mul_kernel[grid](out, gate_up, SIZE=size, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out
