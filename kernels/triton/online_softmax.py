"""Softmax over a context that is read piece by piece (Milakov and Gimelshein, 2018).

Weights are powers of two, for which the device has an instruction: scores are scaled by log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def softmax_step(scores, scale, best, total, MAY_SEE_NOTHING: tl.constexpr):
    """Include the next piece of the context.

    Args:
        scores: ``[rows, tokens]``, not scaled yet, -inf where a row does not see a token.
        scale: factor on the scores, above 0. It is applied within the exponent, where the
            multiplication and the subtraction are one instruction.
        best: ``[rows]``: the largest scaled score so far.
        total: ``[rows]``: the sum of the weights so far, relative to ``best``.
        MAY_SEE_NOTHING: true if a row may have seen no token even after this piece.

    Returns:
        the piece's weights, the factor to apply to all earlier sums, and the next ``best`` and
        ``total``.
    """
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    shift = tl.where(new_best == float("-inf"), 0.0, new_best) if MAY_SEE_NOTHING else new_best
    weights = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(best - shift)
    return weights, decay, new_best, total * decay + tl.sum(weights, 1)
