"""The launch and the residual addition of kernels with one program per row."""

from __future__ import annotations

import triton
import triton.language as tl


def row_launch(size: int) -> dict[str, int]:
    """Return ``BLOCK`` (a power of two that holds a row) and ``num_warps`` for rows of a size.

    Each thread has sixteen elements: enough loads in flight to hide memory's latency, few enough
    for registers. At 16384, the widest row that is supported, it has 32.
    """
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@triton.jit
def load_sum(x, residual, offsets, mask):
    """Return a row of ``x``, or of the rounded ``x + residual``, in float32.

    The rounded sum is left in ``residual``.
    """
    row = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
    if residual is not None:
        row += tl.load(residual + offsets, mask, other=0.0).to(tl.float32)
        rounded = row.to(x.dtype.element_ty)
        tl.store(residual + offsets, rounded, mask)
        row = rounded.to(tl.float32)
    return row
