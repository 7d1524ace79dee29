"""A quantized linear's weight as it lies in a GPU's memory, and how it is put there.

A weight ``[out, in]`` is ``(value - zero) * scale``, where zero and scale are constant in a group of
neighbouring inputs. Values lie in words of 32 bits, ``[rows, out]``: neighbouring programs' threads
read neighbouring outputs. A word holds the values of one output and of `PackedMatrix.per_word` inputs
that are `PackedMatrix.height` inputs apart. So the same bits of ``height`` rows of words are
neighbouring inputs, and a kernel that multiplies them never moves values between threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# Rows of words whose values belong together: the most, and the least that a tensor core takes.
HEIGHTS = (32, 16)
# The least outputs of a program.
LEAST_OUTPUTS = 32


class ValueKind(Enum):
    """What a stored value is: a whole number of 4 bits, of 8 bits, or a float of 8 bits (e4m3)."""

    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 4 if self is ValueKind.INT4 else 8

    @property
    def middle(self) -> int:
        """The zero of values without zeros of their own; stored whole numbers are not negative."""
        return 0 if self is ValueKind.FP8 else 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight ``[out, in]`` as the kernels read it.

    Attributes:
        words: int32 ``[rows, out]``. Row ``c * height + j`` has in its i-th bits, counted from the
            lowest, the value of input ``(c * per_word + i) * height + j``.
        scale: float16, bfloat16 or float32 ``[groups, out]``.
        zero: uint8 ``[groups, out]``; ``None`` if all are the kind's middle.
        order: int64 ``[in]``: the input of the linear that each input of the matrix is; ``None``
            if they are in order.
        arrived: int32, one for every `LEAST_OUTPUTS` outputs: how many of the programs that share
            the inputs of a product have ended; 0 between products.
        num_inputs: the width of the weight; the words are filled up to whole chunks.
        group: inputs of a group: a multiple of ``height``; a part or a multiple of a chunk.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    arrived: Tensor
    num_inputs: int
    group: int
    height: int
    kind: ValueKind

    @property
    def per_word(self) -> int:
        """Values of a word."""
        return 32 // self.kind.bits

    @property
    def run(self) -> int:
        """Values of a word, one after the other, whose inputs are in one group."""
        return min(self.group // self.height, self.per_word)

    @property
    def num_chunks(self) -> int:
        """Groups of ``height`` rows of words."""
        return self.words.shape[0] // self.height

    @property
    def num_outputs(self) -> int:
        return self.words.shape[1]

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        parts = (self.words, self.scale, self.zero, self.order)
        return sum(one.nbytes for one in parts if one is not None)


def packed_group(size: int, kind: ValueKind) -> tuple[int, int] | None:
    """Return the group and height with which groups of ``size`` neighbouring inputs are kept.

    Sizes that fit no chunk are kept as several groups of the same scale and zero; ``None`` if
    these would be too small.
    """
    for height in HEIGHTS:
        chunk = height * 32 // kind.bits
        group = size if size % chunk == 0 else math.gcd(size, chunk)
        if group % height == 0:
            return group, height
    return None


def pack_matrix(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    size: int | None,
    kind: ValueKind,
    order: Tensor | None = None,
) -> PackedMatrix:
    """Pack a weight, on the device of its values. Neighbouring inputs make a group.

    Args:
        values: uint8 ``[out, in]``: whole numbers, or the bits of floats.
        scale: ``[out, groups]`` of a float dtype.
        zero: uint8 ``[out, groups]``, or ``None``, as in `PackedMatrix`.
        size: inputs of a group; ``None`` if all inputs are one group. `packed_group` must allow it.
        order: as in `PackedMatrix`.
    """
    outputs, inputs = values.shape
    whole = packed_group(size, kind) if size is not None else (0, HEIGHTS[0])
    assert whole is not None
    group, height = whole
    per_word = 32 // kind.bits
    chunk = height * per_word
    padded = math.ceil(inputs / chunk) * chunk
    if size is None:
        size = group = padded
    words = torch.zeros(padded // per_word, outputs, dtype=torch.int32, device=values.device)
    # A chunk at a time, so that no more than that is held unpacked in 32 bits.
    for start in range(0, inputs, chunk):
        part = values[:, start : start + chunk].t()
        rows = words[start // per_word : start // per_word + height]
        for i, slot in enumerate(part.split(height)):
            rows[: len(slot)] |= slot.to(torch.int32) << (kind.bits * i)
    num_groups = math.ceil(padded / group)
    return PackedMatrix(
        words=words,
        scale=_by_group(scale, size // group, num_groups),
        zero=None if zero is None else _by_group(zero, size // group, num_groups),
        order=order,
        arrived=torch.zeros(
            math.ceil(outputs / LEAST_OUTPUTS), dtype=torch.int32, device=values.device
        ),
        num_inputs=inputs,
        group=group,
        height=height,
        kind=kind,
    )


def _by_group(numbers: Tensor, times: int, num_groups: int) -> Tensor:
    """Return ``[out, n]``, each of them ``times`` times, as ``[num_groups, out]`` with 0 after."""
    repeated = numbers.repeat_interleave(times, 1)[:, :num_groups].t()
    result = numbers.new_zeros(num_groups, len(numbers))
    result[: len(repeated)] = repeated
    return result
