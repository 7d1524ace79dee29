"""The distribution that a token is drawn from, and the draw: pure functions of logits and rows.

The module knows nothing of batches, blocks or text. Randomness is counter based: each draw is a
pure function of (seed, output index, position, stream), so that a seeded output depends neither
on its neighbours in the batch nor on preemptions. Nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from minserve.engine.device import transfers
from minserve.engine.sampling.rows import SamplingRow, column
from minserve.kernels.truncation import TruncationLimits, truncate
from minserve.sampling_params import SamplingParams

_MASK64 = 2**64 - 1
_PHILOX_MULTIPLIER = 0xD2B74407B1CE6E93
_PHILOX_WEYL = 0x9E3779B97F4A7C15
_PHILOX_ROUNDS = 10
# From so many numbers on NumPy's overhead is less than that of plain Python's arithmetic.
_FEWEST_AT_ONCE = 64

# Streams of draws for one token: the target's own choice, whether a draft is accepted, what
# takes the place of a rejected one, and the draft model's choice.
CHOICE, ACCEPTANCE, RESIDUAL, DRAFT = range(4)

_FLOAT_MAX = torch.finfo(torch.float32).max
_FLOAT_TINY = torch.finfo(torch.float32).tiny
INVALID = -1  # in place of a token id: this row has no distribution to choose from

# Tokens per chunk of the two-level argmax and inverse CDF.
_CHUNK = 256


def philox(counter: tuple[int, int], key: int) -> tuple[int, int]:
    """Return random words by Philox2x64-10.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    Args:
        counter: two unsigned 64-bit words.
        key: one unsigned 64-bit word.

    Returns:
        Two independent uniform 64-bit words.
    """
    low, high = counter
    for _ in range(_PHILOX_ROUNDS):
        product = _PHILOX_MULTIPLIER * low
        low, high = (product >> 64) ^ key ^ high, product & _MASK64
        key = (key + _PHILOX_WEYL) & _MASK64
    return low, high


def uniform(seed: int, index: int, position: int, stream: int = 0) -> float:
    """Return a uniform number in [0, 1) with 53 random bits, the same for the same arguments.

    Args:
        seed: any 64-bit integer, signed or not.
        index: which output of the request, below 2**32.
        position: which output token.
        stream: which draw for that token, below 2**32; 0 chooses the token itself.
    """
    word, _ = philox((position, stream << 32 | index), seed & _MASK64)
    return (word >> 11) * 2.0**-53


def uniforms(rows: SequenceOf[SamplingRow], streams: SequenceOf[int]) -> list[float]:
    """Return the draw of each row's token from its stream."""
    if len(rows) < _FEWEST_AT_ONCE:
        return [
            uniform(row.seq.request.seed, row.seq.index, row.position, stream)
            for row, stream in zip(rows, streams, strict=True)
        ]
    num = len(rows)
    low = np.fromiter((row.position for row in rows), np.uint64, num)
    indices = np.fromiter((row.seq.index for row in rows), np.uint64, num)
    key = np.fromiter((row.seq.request.seed & _MASK64 for row in rows), np.uint64, num)
    high = np.array(streams, dtype=np.uint64) << np.uint64(32) | indices
    for _ in range(_PHILOX_ROUNDS):
        low, high = _high_word(low) ^ key ^ high, low * np.uint64(_PHILOX_MULTIPLIER)
        key = key + np.uint64(_PHILOX_WEYL)
    return ((low >> np.uint64(11)) * 2.0**-53).tolist()


def _high_word(x: np.ndarray) -> np.ndarray:
    """Return the upper 64 of the 128 bits of each product with Philox's multiplier."""
    half, lower = np.uint64(32), np.uint64(2**32 - 1)
    a_high, a_low = np.uint64(_PHILOX_MULTIPLIER >> 32), np.uint64(_PHILOX_MULTIPLIER) & lower
    x_high, x_low = x >> half, x & lower
    middle = a_high * x_low + (a_low * x_low >> half)
    other = a_low * x_high + (middle & lower)
    return a_high * x_high + (middle >> half) + (other >> half)


def argmax(logits: Tensor) -> Tensor:
    """Return the lowest id of the most likely token, ``[rows]``, or `INVALID`."""
    ids = _argmax(logits)
    # argmax takes NaN for the largest number, so the value found tells of any NaN.
    best = logits.gather(-1, ids.unsqueeze(1)).squeeze(1)
    return torch.where(best > -math.inf, ids, INVALID)


def _argmax(logits: Tensor) -> Tensor:
    """Do `torch.argmax`, on a CPU in two levels: there amax is some twenty times as fast."""
    vocab = logits.shape[1]
    whole = vocab // _CHUNK * _CHUNK
    if logits.device.type != "cpu" or not whole or not logits.is_contiguous():
        return logits.argmax(dim=-1)
    chunks = logits[:, :whole].unflatten(1, (-1, _CHUNK))
    highest = chunks.amax(dim=-1)
    if whole < vocab:
        highest = torch.cat((highest, logits[:, whole:].amax(dim=-1, keepdim=True)), dim=1)
    chunk = highest.argmax(dim=-1, keepdim=True)
    # The last chunk is looked up so that it ends with the vocabulary; whatever of it lies in
    # the one before is smaller.
    first = (chunk * _CHUNK).clamp_(max=vocab - _CHUNK)
    inner = logits.gather(1, first + torch.arange(_CHUNK))
    return (first + inner.argmax(dim=-1, keepdim=True)).squeeze(1)


def draw(
    logits: Tensor, rows: SequenceOf[SamplingRow], stream: int = CHOICE, *, fused: bool = False
) -> Tensor:
    """Sample one token id per row, ``[rows]``, by inverse CDF; `INVALID` where none is possible.

    Args:
        logits: float32 ``[rows, vocab]`` from `adjust`.
        fused: as in `weigh`.
    """
    weights, is_valid = weigh(logits, rows, fused=fused)
    draws = uniforms(rows, [stream] * len(rows))
    ids = inverse_cdf(weights, column(draws, weights, torch.float64))
    return torch.where(is_valid, ids, INVALID)


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
    weights = x.new_zeros(rows, -(-vocab // _CHUNK) * _CHUNK)
    torch.exp(x, out=weights[:, :vocab])
    return weights


def warm_up(device: torch.device) -> None:
    """Compile the kernels that a fused `weigh` launches."""
    weights = torch.ones(1, _CHUNK, device=device)
    _truncate(weights, [SamplingParams(top_p=0.5)], _CHUNK, fused=True)


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


def _chunk_sums(weights: Tensor) -> Tensor:
    """Return float64 ``[rows, chunks]``: the sum of each chunk of the vocabulary.

    The few numbers of one chunk are summed in float32, whose error is that of ``exp``.
    """
    return weights.view(len(weights), -1, _CHUNK).sum(-1).double()


def inverse_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """Return the token at which the cumulated probability, in order of ids, exceeds the draw.

    Two levels, chunks of the vocabulary and then tokens of one chunk, so that the
    sequential float64 sum runs over a few hundred numbers instead of the whole vocabulary.

    Args:
        weights: float32 ``[rows, chunks * _CHUNK]``, not normalized; a row is NaN
            throughout or has a positive weight.
        draws: float64 ``[rows, 1]`` in [0, 1).

    Returns:
        Ids ``[rows]``, never that of a token with weight 0; any id for a NaN row.
    """
    sums = _chunk_sums(weights)
    targets = draws * sums.sum(-1, keepdim=True)
    chunk, before = _first_above(sums, targets)
    chunks = weights.view(len(weights), -1, _CHUNK)
    inner = chunks.gather(1, chunk.unsqueeze(2).expand(-1, -1, _CHUNK)).squeeze(1).double()
    token, _ = _first_above(inner, targets - before)
    return (chunk * _CHUNK + token).squeeze(1)


def _first_above(weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the running sum of ``weights`` first exceeds ``targets``, among positive weights.

    Round-off can push a target out of the range of sums, and a parallel scan need not be
    monotone to the last bit: the target is clamped and weights of 0 are left out.

    Args:
        weights: float64 ``[rows, n]``, at least one of each row positive.
        targets: float64 ``[rows, 1]``.

    Returns:
        The indices and the sums of all weights before them, both ``[rows, 1]``.
    """
    cdf = weights.cumsum(-1)
    reached = cdf.masked_fill(weights <= 0.0, 0.0)
    top = reached.amax(-1, keepdim=True)
    targets = targets.clamp(min=0.0).minimum(torch.nextafter(top, torch.zeros_like(top)))
    index = (reached > targets).to(torch.uint8).argmax(-1, keepdim=True)
    return index, (cdf - weights).gather(-1, index)
