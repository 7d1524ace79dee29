"""How kernels with one program per row are launched."""

from __future__ import annotations

import triton


def row_launch(size: int) -> dict[str, int]:
    """``BLOCK`` (a power of two that holds a row) and ``num_warps`` for rows of a size.

    Sixteen elements a thread: enough loads in flight to hide memory's latency, few enough
    for registers. At 16384, the widest row served, it is 32.
    """
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}
