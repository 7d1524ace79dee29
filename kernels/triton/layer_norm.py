"""LayerNorm (Ba et al., 2016), with the residual addition before it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minserve.kernels.triton.rows import load_sum, row_launch


@triton.jit
def _layer_norm_kernel(
    out,
    x,
    weight,
    bias,
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
    # E[x^2] - E[x]^2 would cancel where the mean is large; the row is in registers anyway.
    centred = tl.where(mask, row - tl.sum(row, axis=0) / SIZE, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / SIZE + EPS)
    if weight is not None:
        normed *= tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    if bias is not None:
        normed += tl.load(bias + columns, mask, other=0.0).to(tl.float32)
    tl.store(out + start + columns, normed.to(dtype), mask)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``(x - mean) / sqrt(variance + eps) * weight + bias`` of each row of ``x``.

    With ``residual``, return it of each row of ``residual + x``.

    It is computed in float32 and rounded once, as in torch's `layer_norm`; a sum with ``residual``
    is rounded first.

    Args:
        x: ``[tokens, size]``, contiguous, float16, bfloat16 or float32; ``size`` at most 16384.
        weight, bias: ``[size]``; either may be absent.
        residual: shape and dtype as ``x``; the sum is left in it.

    Returns:
        ``[tokens, size]`` in the dtype of ``x``.
    """
    tokens, size = x.shape
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = torch.empty_like(x)
    if tokens:
        _layer_norm_kernel[(tokens,)](
            out, x, weight, bias, residual, EPS=eps, SIZE=size, **row_launch(size)
        )
    return out
