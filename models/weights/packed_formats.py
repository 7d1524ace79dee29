"""How quantized linear weights are stored, and the arithmetic that makes them float32 again.

All forms are affine: a weight is ``(value - zero) * scale``, where zero and scale are constant in
a group of weights. The product is computed in float32. Values have at most 8 bits and scales of 16
bits at most 11, so float32 holds it exactly then; with float32 scales it is rounded once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor

# Weights that are unpacked at a time: a chunk stays in the processor's caches, and the memory
# needed besides the result is a few such chunks.
CHUNK = 2**20
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# e8m0 holds powers of two.
SCALES = (*FLOATS, torch.float8_e8m0fnu)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
PACKED = (torch.int32,)
# The value that each position of an AWQ word stands for, counted from the lowest four bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class StoredParts(Protocol):
    """The stored tensors of one quantized linear, by the last part of their names.

    Attributes:
        name: the name of the linear, such as ``model.layers.0.mlp.up_proj``.
    """

    name: str

    def has(self, part: str) -> bool:
        """Tell whether a tensor is stored."""

    def shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, from the file's header."""

    def read(
        self, part: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """Read a tensor of one of these dtypes and of this shape.

        Raises:
            ModelLoadError: naming file and tensor, if it is missing or something else.
        """

    def fail(self, part: str, reason: str) -> NoReturn:
        """Raise a ModelLoadError that names the file and the tensor."""


class PackedFormat(ABC):
    """A form in which linear weights are stored.

    Attributes:
        title: its name for messages.
        notes: what a user must know of how it is read; for the log.
        marks: a linear that has one of these tensors is quantized.
        parts: all tensors that a quantized weight may consist of.
    """

    title: str
    notes: tuple[str, ...] = ()
    marks: tuple[str, ...]
    parts: tuple[str, ...]

    @abstractmethod
    def shape(self, stored: StoredParts) -> tuple[int, ...]:
        """Return the shape ``(out, in)`` of a linear's weight, without reading it.

        Raises:
            ModelLoadError: naming file and tensor, if a needed tensor is missing or wrong.
        """

    @abstractmethod
    def dequantize(self, stored: StoredParts) -> Tensor:
        """Return a linear's weight, float32 ``[out, in]``.

        Raises:
            ModelLoadError: naming file and tensor, if a tensor is missing or does not fit.
        """


@dataclass(frozen=True)
class GptqFormat(PackedFormat):
    """GPTQ as AutoGPTQ and GPTQModel store it.

    Words of 32 bits hold values that follow each other along the inputs (``qweight``,
    ``[in / n, out]``) or along the outputs (``qzeros``, ``[groups, out / n]``); ``scales`` are
    ``[groups, out]``. ``g_idx`` (``[in]``) names the group of each input.

    Attributes:
        bits: of a value: 2, 4 or 8.
        group_size: inputs of a group; -1 for one group.
        act_order: true if groups are not neighbouring inputs (``desc_act``), so that ``g_idx``
            is needed.
        zeros_less_one: true if each zero is stored minus one (the first version of the format).
    """

    bits: int
    group_size: int
    act_order: bool
    zeros_less_one: bool
    title = "GPTQ"
    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def shape(self, stored: StoredParts) -> tuple[int, ...]:
        words, rows = matrix_shape(stored, "qweight")
        return rows, words * (32 // self.bits)

    def dequantize(self, stored: StoredParts) -> Tensor:
        per_word = 32 // self.bits
        packed = matrix(stored, "qweight", PACKED)
        cols, rows = packed.shape[0] * per_word, packed.shape[1]
        size = cols if self.group_size == -1 else self.group_size
        groups = math.ceil(cols / size)
        scale = stored.read("scales", FLOATS, (groups, rows))
        zero = stored.read("qzeros", PACKED, (groups, math.ceil(rows / per_word)))
        if self.zeros_less_one:
            # One is added to whole words, as GPTQModel takes it away: a zero of 0 borrows.
            zero = zero + (0xFFFFFFFF // ((1 << self.bits) - 1))
        return affine(
            (rows, cols),
            lambda start, stop: unpack(packed[:, start:stop].t(), self.bits),
            scale.t(),
            unpack(zero, self.bits)[:, :rows].t(),
            self._groups(stored, cols, size, groups),
        )

    def _groups(self, stored: StoredParts, cols: int, size: int, groups: int) -> Tensor | None:
        if not stored.has("g_idx"):
            if self.act_order:
                stored.fail("g_idx", "is missing, and desc_act says that it is needed")
            return neighbours(cols, size)
        index = stored.read("g_idx", INTEGERS, (cols,))
        # Some tools leave it as zeros where inputs keep their order.
        if not self.act_order and not index.any():
            return neighbours(cols, size)
        return group_index(stored, "g_idx", index, size, groups)


@dataclass(frozen=True)
class AwqFormat(PackedFormat):
    """AWQ as AutoAWQ stores it, with 4 bits.

    Version gemm has words along the outputs, whose values are interleaved (`AWQ_ORDER`):
    ``qweight`` ``[in, out / 8]``, ``qzeros`` ``[groups, out / 8]``, ``scales`` ``[groups, out]``.
    Version gemv has words along the inputs or groups, in order: ``qweight`` ``[out, in / 8]``,
    ``qzeros`` ``[out, at least groups / 8]``, ``scales`` ``[out, 8 * width of qzeros]``.

    Attributes:
        group_size: inputs of a group; -1 for one group.
        version: gemm or gemv.
    """

    group_size: int
    version: str
    title = "AWQ"
    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales")

    def shape(self, stored: StoredParts) -> tuple[int, ...]:
        first, second = matrix_shape(stored, "qweight")
        return (second * 8, first) if self.version == "gemm" else (first, second * 8)

    def dequantize(self, stored: StoredParts) -> Tensor:
        packed = matrix(stored, "qweight", PACKED)
        return self._gemm(stored, packed) if self.version == "gemm" else self._gemv(stored, packed)

    def _gemm(self, stored: StoredParts, packed: Tensor) -> Tensor:
        cols, words = packed.shape
        size = self._size(stored, cols)
        scale = stored.read("scales", FLOATS, (cols // size, words * 8))
        zero = stored.read("qzeros", PACKED, (cols // size, words))
        return affine(
            (words * 8, cols),
            lambda start, stop: _unpack_awq(packed[:, start // 8 : stop // 8]),
            scale.t(),
            _unpack_awq(zero),
            neighbours(cols, size),
        )

    def _gemv(self, stored: StoredParts, packed: Tensor) -> Tensor:
        rows, cols = packed.shape[0], packed.shape[1] * 8
        size = self._size(stored, cols)
        groups = cols // size
        zero = matrix(stored, "qzeros", PACKED)
        if zero.shape[0] != rows or zero.shape[1] * 8 < groups:
            stored.fail("qzeros", f"has shape {tuple(zero.shape)}, which does not fit qweight")
        scale = stored.read("scales", FLOATS, (rows, zero.shape[1] * 8))
        return affine(
            (rows, cols),
            lambda start, stop: unpack(packed[start:stop], 4),
            scale[:, :groups],
            unpack(zero, 4)[:, :groups],
            neighbours(cols, size),
        )

    def _size(self, stored: StoredParts, cols: int) -> int:
        size = cols if self.group_size == -1 else self.group_size
        if cols % size:
            stored.fail("qweight", f"has {cols} inputs, no multiple of the group size {size}")
        return size


@dataclass(frozen=True)
class Fp8Format(PackedFormat):
    """8 bit floats with a scale for the whole weight, for each output, or for each block.

    The scale is ``weight_scale`` or, in spite of its name also a factor, ``weight_scale_inv``.

    Attributes:
        block: outputs and inputs of a block; ``None`` for one scale, or one for each output.
    """

    block: tuple[int, int] | None
    title: str = "FP8"
    notes: tuple[str, ...] = ("activations are not quantized",)
    marks = ("weight_scale", "weight_scale_inv")
    parts = ("weight", "weight_scale", "weight_scale_inv")

    def shape(self, stored: StoredParts) -> tuple[int, ...]:
        return stored.shape("weight")

    def dequantize(self, stored: StoredParts) -> Tensor:
        weight = matrix(stored, "weight", FLOAT8)
        part = "weight_scale_inv" if stored.has("weight_scale_inv") else "weight_scale"
        scale = stored.read(part, SCALES)
        if self.block is not None:
            strategy = "block"
        else:
            strategy = "tensor" if scale.numel() == 1 else "channel"
        rows, cols = weight.shape
        return affine(
            (rows, cols),
            lambda start, stop: weight[start:stop],
            scale_rows(stored, part, scale, (rows, cols), strategy, self.block),
            index=None if self.block is None else neighbours(cols, self.block[1]),
        )


def affine(
    shape: tuple[int, int],
    values: Callable[[int, int], Tensor],
    scale: Tensor,
    zero: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Return ``(values - zero) * scale`` as a float32 tensor, computed a few rows at a time.

    Args:
        shape: rows (outputs) and columns (inputs) of the weight.
        values: returns the stored values of the rows from start to stop, ``[stop - start, at
            least columns]``; start is a multiple of 8, and stop as well or the number of rows.
        scale: ``[rows, groups]`` of any float dtype.
        zero: like ``scale``, of any number dtype; ``None`` for 0.
        index: int64 ``[columns]``, the group of each column; ``None`` if groups are neighbouring
            columns, equally many each.
    """
    rows, cols = shape
    result = torch.empty(shape, dtype=torch.float32)
    step = max(8, CHUNK // max(1, cols) // 8 * 8)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part = result[start:stop]
        part.copy_(values(start, stop)[:, :cols])
        if index is None:
            part = part.view(stop - start, scale.shape[1], -1)
        for number, change in ((zero, part.sub_), (scale, part.mul_)):
            if number is not None:
                some = number[start:stop].float()
                change(some.unsqueeze(-1) if index is None else some[:, index])
    return result


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned values in words of 32 bits, the first in the lowest bits of a word.

    ``words`` is int32 ``[rows, n]``, the result uint8 ``[rows, n * 32 / bits]``; ``bits`` is 1, 2,
    4 or 8.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    fields = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).flatten(1)


def _unpack_awq(words: Tensor) -> Tensor:
    """Return the values in words ``[n, outputs / 8]`` of AWQ as uint8 ``[outputs, n]``."""
    turned = words.t().contiguous()
    result = torch.empty(turned.shape[0], 8, turned.shape[1], dtype=torch.uint8)
    for position, output in enumerate(AWQ_ORDER):
        result[:, output] = (turned >> (4 * position)) & 15
    return result.flatten(0, 1)


def neighbours(cols: int, size: int) -> Tensor | None:
    """Return the `affine` index of groups of neighbouring columns; the last may be smaller."""
    return torch.arange(cols) // size if cols % size else None


def group_index(
    stored: StoredParts, part: str, index: Tensor, size: int, groups: int
) -> Tensor | None:
    """Return the `affine` index for stored numbers of groups, ``[columns]``.

    Raises:
        ModelLoadError: if a number is no group's.
    """
    index = index.long()
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= groups):
        stored.fail(
            part, f"names groups {index.min()} to {index.max()}, but there are {groups} groups"
        )
    if torch.equal(index, torch.arange(len(index)) // size):
        return neighbours(len(index), size)
    return index


def matrix(stored: StoredParts, part: str, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Read a tensor of two dimensions.

    Raises:
        ModelLoadError: if it is missing or something else.
    """
    tensor = stored.read(part, dtypes)
    if tensor.dim() != 2 or not tensor.numel():
        stored.fail(part, f"has shape {tuple(tensor.shape)}, which is no weight's")
    return tensor


def matrix_shape(stored: StoredParts, part: str) -> tuple[int, int]:
    """Return the shape of a tensor of two dimensions, from the file's header.

    Raises:
        ModelLoadError: if it is missing or has other dimensions.
    """
    shape = stored.shape(part)
    if len(shape) != 2 or not math.prod(shape):
        stored.fail(part, f"has shape {shape}, which is no weight's")
    return shape[0], shape[1]


def scale_rows(
    stored: StoredParts,
    part: str,
    scale: Tensor,
    shape: tuple[int, int],
    strategy: str,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Return scales (or zeros) as float32 ``[rows, groups]``, whatever one of them is for.

    Args:
        shape: rows and columns of the weight.
        strategy: tensor (one scale), channel (one a row), group or block (one a block).
        block: rows and columns of a block; a group is a block of one row.

    Raises:
        ModelLoadError: if the number of scales does not fit.
    """
    rows, cols = shape
    height, width = block or (rows if strategy == "tensor" else 1, cols)
    wanted = (math.ceil(rows / height), math.ceil(cols / width))
    # A single scale of a tensor or row may lack a dimension.
    shapes = {wanted} if block else {wanted, wanted[:1], (), (1,)}
    if tuple(scale.shape) not in shapes or scale.numel() != math.prod(wanted):
        stored.fail(
            part,
            f"has shape {tuple(scale.shape)}, but a weight {tuple(shape)} with one scale a "
            f"{strategy} needs {wanted}",
        )
    return scale.float().reshape(wanted).repeat_interleave(height, 0)[:rows]
