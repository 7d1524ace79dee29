"""Random numbers for the choice of tokens, each a pure function of what it is for.

A number depends on the request's seed, the output's index, the token's position and the stream
alone (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and so neither on
the neighbours in a batch nor on preemptions.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from minserve.engine.sampling.rows import SamplingRow
from minserve.kernels.upload import to_device

# Streams of draws for one token: the target's own choice, whether a draft is accepted, what
# takes the place of a rejected one, and the draft model's choice.
CHOICE, ACCEPTANCE, RESIDUAL, DRAFT = range(4)

_MASK64 = 2**64 - 1
_PHILOX_MULTIPLIER = 0xD2B74407B1CE6E93
_WEYL = 0x9E3779B97F4A7C15
_PHILOX_ROUNDS = 10
# From so many numbers on NumPy's overhead is less than that of plain Python's arithmetic.
_FEWEST_AT_ONCE = 64


def philox(counter: tuple[int, int], key: int) -> tuple[int, int]:
    """Return random words by Philox2x64-10.

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
        key = (key + _WEYL) & _MASK64
    return low, high


def word(seed: int, index: int, position: int, stream: int = CHOICE) -> int:
    """Return 64 random bits, the same for the same arguments.

    Args:
        seed: any 64-bit integer, signed or not.
        index: which output of the request, below 2**32.
        position: which output token.
        stream: which draw for that token, below 2**32.
    """
    return philox((position, stream << 32 | index), seed & _MASK64)[0]


def words(rows: SequenceOf[SamplingRow], streams: SequenceOf[int]) -> np.ndarray:
    """Return the `word` of each row's token in its stream, uint64 ``[rows]``."""
    num = len(rows)
    if num < _FEWEST_AT_ONCE:
        own = (
            word(row.seq.request.seed, row.seq.index, row.position, stream)
            for row, stream in zip(rows, streams, strict=True)
        )
        return np.fromiter(own, np.uint64, num)
    low = np.fromiter((row.position for row in rows), np.uint64, num)
    indices = np.fromiter((row.seq.index for row in rows), np.uint64, num)
    key = np.fromiter((row.seq.request.seed & _MASK64 for row in rows), np.uint64, num)
    high = np.array(streams, dtype=np.uint64) << np.uint64(32) | indices
    for _ in range(_PHILOX_ROUNDS):
        low, high = _high_word(low) ^ key ^ high, low * np.uint64(_PHILOX_MULTIPLIER)
        key = key + np.uint64(_WEYL)
    return low


def _high_word(x: np.ndarray) -> np.ndarray:
    """Return the upper 64 of the 128 bits of each product with Philox's multiplier."""
    half, lower = np.uint64(32), np.uint64(2**32 - 1)
    a_high, a_low = np.uint64(_PHILOX_MULTIPLIER >> 32), np.uint64(_PHILOX_MULTIPLIER) & lower
    x_high, x_low = x >> half, x & lower
    middle = a_high * x_low + (a_low * x_low >> half)
    other = a_low * x_high + (middle & lower)
    return a_high * x_high + (middle >> half) + (other >> half)


def uniforms(words: np.ndarray) -> np.ndarray:
    """Return words as numbers in [0, 1) with 53 random bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def to_keys(words: np.ndarray, device: torch.device) -> Tensor:
    """Return words as the keys of `exponentials`, int64 ``[rows, 1]`` on the device."""
    return to_device(words.view(np.int64).tolist(), torch.int64, device).unsqueeze(1)


def exponentials(keys: Tensor, num: int) -> Tensor:
    """Return standard exponential numbers, float64 ``[rows, num]``, the same for the same key.

    They are made of the first outputs of SplitMix64 (Steele et al., "Fast splittable pseudorandom
    number generators", OOPSLA 2014) with a row's key as its state, on the device of the keys.
    None is 0 or infinite.

    Args:
        keys: int64 ``[rows, 1]``.
    """
    # int64 wraps around as the unsigned words do.
    z = torch.arange(1, num + 1, device=keys.device).mul_(_signed(_WEYL)) + keys
    z = (z ^ _shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z = (z ^ _shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
    z = z ^ _shifted(z, 31)
    # In steps of 2**-52, half a step away from 0 and from 1.
    uniform = _shifted(z, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_()


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(z: Tensor, num: int) -> Tensor:
    """Shift unsigned words to the right."""
    return (z >> num).bitwise_and_(2 ** (64 - num) - 1)
