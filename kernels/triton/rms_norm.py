"""RMSNorm (Zhang and Sennrich, 2019), with the residual addition before it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minserve.kernels.triton.rows import load_sum, row_launch


@triton.jit
def _rms_norm_kernel(
    out,
    x,
    weight,
    residual,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = x.dtype.element_ty
    row = load_sum(x, residual, start + columns, mask)
    inverse = tl.rsqrt(tl.sum(row * row, axis=0) / SIZE + EPS)
    scale = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    tl.store(out + start + columns, (row * inverse * scale).to(dtype), mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x / rms(x) * weight`` of each row of ``x``, or of ``residual + x``.

    It is computed in float32 and rounded where the torch form rounds: the sum and the result.

    Args:
        x: ``[tokens, size]``, contiguous, float16, bfloat16 or float32; ``size`` at most 16384.
        weight: ``[size]``.
        residual: shape and dtype as ``x``; the sum is left in it.

    Returns:
        ``[tokens, size]`` in the dtype of ``x``.
    """
    tokens, size = x.shape
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = torch.empty_like(x)
    if tokens:
        _rms_norm_kernel[(tokens,)](
            out, x, weight, residual, EPS=eps, SIZE=size, **row_launch(size)
        )
    return out
