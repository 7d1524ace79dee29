"""Truncation by min_p, top_k and top_p in one launch, without a sort: one program per row.

`minserve.kernels.truncation` defines which weights are kept. Weights are compared as whole numbers,
the bits of floats. The border of top_k, then that of top_p, is found by bisection on these numbers.
Each look at the row sums up the weights above the middle, and finds the weights next to the middle
on both sides, which are the next ends of the search. So the search stops as soon as one weight is
left between them: after about 15 looks in all for a usual vocabulary, and after 2 if one token has
all the mass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minserve.kernels import truncation
from minserve.kernels.truncation import TruncationLimits
from minserve.kernels.upload import to_device

# Few enough registers per thread that a multiprocessor holds all 32 warps.
BLOCK, NUM_WARPS = 8192, 32
UNITS = tl.constexpr(truncation.UNITS)
KEY_OF_ONE = tl.constexpr(truncation.KEY_OF_ONE)
# The key of one unit, 2**-40: smaller weights add nothing to a sum.
KEY_OF_UNIT = tl.constexpr((127 - 40) << 23)
BEYOND_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def _in_units(keys):
    """Return what weights add to a sum, in whole units."""
    return (keys.to(tl.float32, bitcast=True) * UNITS).to(tl.int64)


@triton.jit
def _look(row, size, middle, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return three numbers about the keys at least ``middle`` and the keys below it.

    They are the sum, or the count, of the keys at least ``middle``, the smallest of these keys, and
    the largest key below ``middle``; -1 if there is none below.
    """
    sums = tl.zeros([BLOCK], tl.int64)
    least = tl.full([BLOCK], BEYOND_ALL, tl.int32)
    largest = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keys = tl.load(row + columns, columns < size, other=-1)
        is_above = keys >= middle
        if COUNTS:
            sums += is_above.to(tl.int64)
        else:
            sums += _in_units(tl.where(is_above, keys, 0))
        least = tl.minimum(least, tl.where(is_above, keys, BEYOND_ALL))
        largest = tl.maximum(largest, tl.where(is_above, -1, keys))
    return tl.sum(sums, 0), tl.min(least, 0), tl.max(largest, 0)


@triton.jit
def _bisect(row, size, low, reached, wanted, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest key, from ``low`` on, for which all keys at least as large reach
    ``wanted``.

    If no key reaches it, the result is for ``low``.

    Args:
        reached: sum or count of the keys from ``low`` on.

    Returns:
        the key, the sum or count of the keys at least as large, and that of the larger keys.
    """
    high = tl.full([], KEY_OF_ONE + 1, tl.int32)
    above = tl.full([], 0, tl.int64)
    while high - low > 1:
        middle = (low + high) // 2
        found, least, largest = _look(row, size, middle, COUNTS, BLOCK)
        if found >= wanted:
            low = least
            reached = found
        else:
            high = largest + 1
            above = found
    return low, reached, above


@triton.jit
def _drop_ties(row, size, border, num_kept, BLOCK: tl.constexpr):
    """Set the keys that equal ``border`` to 0, except the first ``num_kept`` of them."""
    seen = 0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_tied = tl.load(row + columns, columns < size, other=-1) == border
        place = seen + tl.cumsum(is_tied.to(tl.int32), 0)
        tl.store(row + columns, tl.zeros([BLOCK], tl.int32), is_tied & (place > num_kept))
        seen += tl.sum(is_tied.to(tl.int32), 0)


@triton.jit
def _drop_below(row, size, border, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keys = tl.load(row + columns, columns < size, other=BEYOND_ALL)
        tl.store(row + columns, tl.zeros([BLOCK], tl.int32), keys < border)


@triton.jit
def _truncate_kernel(keys, limits, size, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    row = keys + index.to(tl.int64) * size
    min_p = tl.load(limits + 3 * index).to(tl.float32)
    top_k = tl.load(limits + 3 * index + 1).to(tl.int64)
    top_p = tl.load(limits + 3 * index + 2)
    low = tl.maximum(min_p.to(tl.int32, bitcast=True), 0)  # of -0.0 it would be less
    if tl.load(row).to(tl.float32, bitcast=True) >= 0.0:  # false for a row of NaN
        if top_k > 0:
            low, _, _ = _bisect(row, size, low, top_k, top_k, True, BLOCK)
        if top_p < 1.0:
            total, least, _ = _look(row, size, low, False, BLOCK)
            wanted = tl.minimum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), total)
            low = tl.maximum(least, KEY_OF_UNIT)
            low, reached, above = _bisect(row, size, low, total, wanted, False, BLOCK)
            unit = _in_units(low)
            num_kept = (wanted - above + unit - 1) // unit
            if above + num_kept * unit < reached:
                _drop_ties(row, size, low, num_kept, BLOCK)
        if low > 0:
            _drop_below(row, size, low, BLOCK)


def truncate(weights: torch.Tensor, limits: TruncationLimits) -> torch.Tensor:
    """Set to 0 the weights that the limits leave out. The work is enqueued on the device.

    Args:
        weights: float32 ``[rows, size]``, contiguous, from 0 to 1; the largest of each row is 1.
            A row that is NaN throughout stays so. Changed in place.

    Returns:
        ``weights``.
    """
    assert weights.is_contiguous()
    rows, size = weights.shape
    if rows:
        per_row = list(zip(*limits, strict=True))
        _truncate_kernel[(rows,)](
            weights.view(torch.int32),
            to_device(per_row, torch.float64, weights.device),
            size,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return weights
