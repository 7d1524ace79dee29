"""The distribution that a token is drawn from, and the draw: pure functions of logits and rows.

The module knows nothing of batches, blocks or text, and nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from minserve.engine.device import transfers
from minserve.engine.sampling.noise import CHOICE, exponentials, to_keys, words
from minserve.engine.sampling.rows import SamplingRow, column
from minserve.kernels.truncation import TruncationLimits, truncate
from minserve.sampling_params import SamplingParams

_FLOAT_MAX = torch.finfo(torch.float32).max
_FLOAT_TINY = torch.finfo(torch.float32).tiny
INVALID = -1  # in place of a token id: this row has no distribution to choose from

# Tokens per chunk of the two-level argmax and draw.
CHUNK = 256


def argmax(logits: Tensor) -> Tensor:
    """Return the lowest id of the most likely token, ``[rows]``, or `INVALID`."""
    ids = _argmax(logits)
    # argmax takes NaN for the largest number, so the value found tells of any NaN.
    best = logits.gather(-1, ids.unsqueeze(1)).squeeze(1)
    return torch.where(best > -math.inf, ids, INVALID)


def _argmax(logits: Tensor) -> Tensor:
    """Do `torch.argmax`, on a CPU in two levels: there amax is some twenty times as fast."""
    vocab = logits.shape[1]
    whole = vocab // CHUNK * CHUNK
    if logits.device.type != "cpu" or not whole or not logits.is_contiguous():
        return logits.argmax(dim=-1)
    chunks = logits[:, :whole].unflatten(1, (-1, CHUNK))
    highest = chunks.amax(dim=-1)
    if whole < vocab:
        highest = torch.cat((highest, logits[:, whole:].amax(dim=-1, keepdim=True)), dim=1)
    chunk = highest.argmax(dim=-1, keepdim=True)
    # The last chunk is looked up so that it ends with the vocabulary; whatever of it lies in
    # the one before is smaller.
    first = (chunk * CHUNK).clamp_(max=vocab - CHUNK)
    inner = logits.gather(1, first + torch.arange(CHUNK))
    return (first + inner.argmax(dim=-1, keepdim=True)).squeeze(1)


def draw(
    logits: Tensor, rows: SequenceOf[SamplingRow], stream: int = CHOICE, *, fused: bool = False
) -> Tensor:
    """Sample one token id per row, ``[rows]``; `INVALID` where none is possible.

    Args:
        logits: float32 ``[rows, vocab]`` from `adjust`.
        fused: as in `weigh`.
    """
    weights, is_valid = weigh(logits, rows, fused=fused)
    keys = to_keys(words(rows, [stream] * len(rows)), weights.device)
    return torch.where(is_valid, choose(weights, keys), INVALID)


def weigh(
    logits: Tensor, rows: SequenceOf[SamplingRow], *, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the distribution of each row, after temperature and truncation.

    Args:
        logits: float32 ``[rows, vocab]`` from `adjust`.
        fused: whether to truncate in one Triton kernel; it keeps what plain torch keeps.

    Returns:
        Weights, float32 ``[rows, >= vocab]``, not normalized and filled up with zeros to
        whole chunks of the vocabulary; and bool ``[rows]``, false where the logits contain
        NaN or leave no token possible.
    """
    # Finite, and with the largest at 0 before the division, so that nothing overflows
    # however large the logits or small the temperature.
    x = logits.clamp(max=_FLOAT_MAX)
    best = x.amax(dim=-1, keepdim=True)
    x.sub_(best).div_(column([max(row.params.temperature, _FLOAT_TINY) for row in rows], x))
    weights = _padded_exp(x)
    _truncate(weights, [row.params for row in rows], logits.shape[1], fused)
    return weights, best.squeeze(1) > -math.inf


def _padded_exp(x: Tensor) -> Tensor:
    """Return ``exp(x)``, filled up with zeros to whole chunks of the vocabulary."""
    rows, vocab = x.shape
    weights = x.new_zeros(rows, -(-vocab // CHUNK) * CHUNK)
    torch.exp(x, out=weights[:, :vocab])
    return weights


def _truncate(weights: Tensor, params: SequenceOf[SamplingParams], vocab: int, fused: bool) -> None:
    """Set the weights to 0 that min_p, then top_k, then top_p leave out."""
    limits = TruncationLimits(
        [p.min_p for p in params],
        [p.top_k if p.top_k < vocab else 0 for p in params],
        [p.top_p for p in params],
    )
    if limits.keep_all:
        return
    if fused:
        from minserve.kernels.triton.truncation import truncate as fused_truncate

        fused_truncate(weights, limits)
    else:
        truncate(weights, limits, may_look=not transfers.runs_behind(weights.device))


def choose(weights: Tensor, keys: Tensor) -> Tensor:
    """Return a token for each row, drawn with the probabilities that are as its weights.

    The Gumbel-max trick (Maddison et al., "A* sampling", NeurIPS 2014) in the form of a race:
    that of numbers which takes ``exponential / weight`` seconds, and comes in first, is taken. It
    is done twice, among chunks of the vocabulary by their sums, and among the tokens of that
    chunk, so that few numbers are needed. What is taken changes only where two are in a near
    tie: rounding of other tokens' weights moves a draw by inverse CDF, but not this one.

    Args:
        weights: float32 ``[rows, chunks * CHUNK]``, not normalized; a row is NaN
            throughout or has a positive weight.
        keys: of the rows' noise, int64 ``[rows, 1]``. A chunk's noise, and that of a place in a
            chunk, depends on nothing else, however wide the vocabulary.

    Returns:
        Ids ``[rows]``, never that of a token with weight 0; any id for a NaN row.
    """
    chunks = weights.view(len(weights), -1, CHUNK)
    # A chunk's few numbers are summed in float32, whose error is that of ``exp``.
    sums = chunks.sum(-1)
    noise = exponentials(keys, CHUNK + sums.shape[1])
    chunk = (sums / noise[:, CHUNK:]).argmax(-1, keepdim=True)
    inner = chunks.gather(1, chunk.unsqueeze(2).expand(-1, -1, CHUNK)).squeeze(1)
    token = (inner / noise[:, :CHUNK]).argmax(-1, keepdim=True)
    return (chunk * CHUNK + token).squeeze(1)
