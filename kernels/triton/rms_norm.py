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
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = x.dtype.element_ty
    columns += row * SIZE
    values = load_sum(x, residual, token * X_STRIDE + columns, mask)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + EPS)
    scale = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    tl.store(out + token * OUT_STRIDE + columns, (values * inverse * scale).to(dtype), mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x / rms(x) * weight`` of each row of ``x``, or of ``residual + x``.

    It is computed in float32 and rounded where the torch form rounds: the sum and the result.

    Args:
        x: ``[tokens, size]``, or ``[tokens, rows, size]``: float16, bfloat16 or float32; ``size``
            at most 16384. The values of a token are adjacent, tokens need not be.
        weight: contiguous, as ``x`` without the tokens.
        residual: contiguous, shape and dtype as ``x``, which must be contiguous then; the sum is
            left in it.
        out: where the result goes, shaped as ``x``; it may be ``x`` itself.

    Returns:
        ``out``, by default a new contiguous tensor with shape and dtype of ``x``.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    tokens, size = x.shape[0], x.shape[-1]
    rows = x.shape[1] if x.dim() == 3 else 1
    assert x.shape[1:] == weight.shape
    assert all(one.stride()[1:] == weight.stride() for one in (x, out))
    assert residual is None or (residual.is_contiguous() and x.is_contiguous())
    if tokens:
        _rms_norm_kernel[(tokens, rows)](
            out,
            x,
            weight,
            residual,
            EPS=eps,
            SIZE=size,
            X_STRIDE=x.stride(0),
            OUT_STRIDE=out.stride(0),
            **row_launch(size),
        )
    return out
