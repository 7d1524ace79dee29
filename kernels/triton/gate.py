"""The gate of an MLP (Shazeer, 2020): ``silu(gate) * up``, or ``gelu(gate) * up``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Eight elements per thread: one load of 16 bytes in half precision.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _gate_kernel(out, gate_up, GELU: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = out.dtype.element_ty
    gates = gate_up + token * (2 * SIZE)
    gate = tl.load(gates + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(gates + SIZE + columns, mask, other=0.0).to(tl.float32)
    # (1 + tanh(x)) / 2 is the logistic function of 2 x, so both activations are a product with it.
    slope = gate
    if GELU:
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    gate = (gate / (1.0 + tl.exp(-slope))).to(dtype).to(tl.float32)
    tl.store(out + token * SIZE + columns, (gate * up).to(dtype), mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``, where the rows of ``gate_up`` hold gate, then up.

    It is computed in float32 and rounded where the torch form rounds: silu and the product.

    Args:
        gate_up: ``[tokens, 2 * n]``, contiguous, float16, bfloat16 or float32.

    Returns:
        ``[tokens, n]``.
    """
    return _gate(gate_up, gelu=False)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``gelu(gate) * up``, GELU by tanh, as `silu_mul` does."""
    return _gate(gate_up, gelu=True)


def _gate(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(tokens, size)
    if tokens:
        grid = (tokens, triton.cdiv(size, BLOCK))
        _gate_kernel[grid](out, gate_up, GELU=gelu, SIZE=size, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out
