"""How quantized linear weights are stored, form by form; affine.py has the arithmetic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from minserve.models.weights.affine import (
    FLOAT8,
    FLOATS,
    INTEGERS,
    PACKED,
    SCALES,
    AffineWeight,
    Shape,
    StoredParts,
    group_index,
    matrix,
    matrix_shape,
    neighbours,
    scale_rows,
    scale_shapes,
    unpack,
)

# The value that each position of an AWQ word stands for, counted from the lowest four bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_BITS = 4


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
    def beside(self, stored: StoredParts) -> dict[str, set[Shape] | None]:
        """Return the parts that must be stored beside the values, without reading any.

        Returns:
            by the part's name the shapes that it may have; ``None`` for any shape.

        Raises:
            ModelLoadError: naming file and tensor, if the values themselves are missing or wrong.
        """

    @abstractmethod
    def read(self, stored: StoredParts) -> AffineWeight:
        """Read the tensors of a linear's weight ``[out, in]``.

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

    def beside(self, stored: StoredParts) -> dict[str, set[Shape] | None]:
        rows, cols = self.shape(stored)
        groups = 1 if self.group_size == -1 else math.ceil(cols / self.group_size)
        zeros = (groups, math.ceil(rows * self.bits / 32))
        wanted: dict[str, set[Shape] | None] = {"scales": {(groups, rows)}, "qzeros": {zeros}}
        if self.act_order or stored.has("g_idx"):
            wanted["g_idx"] = {(cols,)}
        return wanted

    def read(self, stored: StoredParts) -> AffineWeight:
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
        return AffineWeight(
            (rows, cols),
            lambda start, stop: unpack(packed[:, start:stop].t(), self.bits),
            scale.t(),
            unpack(zero, self.bits)[:, :rows].t(),
            self._groups(stored, cols, size, groups),
            self.bits,
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

    def beside(self, stored: StoredParts) -> dict[str, set[Shape] | None]:
        rows, cols = self.shape(stored)
        groups = cols // self._size(stored, cols)
        if self.version == "gemm":
            return {"scales": {(groups, rows)}, "qzeros": {(groups, rows // 8)}}
        width = math.ceil(groups / 8)
        if stored.has("qzeros") and (shape := stored.shape("qzeros"))[:1] == (rows,):
            width = max(width, *shape[1:2])  # tools differ in the padding
        return {"scales": {(rows, width * 8)}, "qzeros": {(rows, width)}}

    def read(self, stored: StoredParts) -> AffineWeight:
        packed = matrix(stored, "qweight", PACKED)
        return self._gemm(stored, packed) if self.version == "gemm" else self._gemv(stored, packed)

    def _gemm(self, stored: StoredParts, packed: Tensor) -> AffineWeight:
        cols, words = packed.shape
        size = self._size(stored, cols)
        scale = stored.read("scales", FLOATS, (cols // size, words * 8))
        zero = stored.read("qzeros", PACKED, (cols // size, words))
        return AffineWeight(
            (words * 8, cols),
            lambda start, stop: _unpack_awq(packed[:, start // 8 : stop // 8]),
            scale.t(),
            _unpack_awq(zero),
            neighbours(cols, size),
            AWQ_BITS,
        )

    def _gemv(self, stored: StoredParts, packed: Tensor) -> AffineWeight:
        rows, cols = packed.shape[0], packed.shape[1] * 8
        size = self._size(stored, cols)
        groups = cols // size
        zero = matrix(stored, "qzeros", PACKED)
        if zero.shape[0] != rows or zero.shape[1] * 8 < groups:
            stored.fail("qzeros", f"has shape {tuple(zero.shape)}, which does not fit qweight")
        scale = stored.read("scales", FLOATS, (rows, zero.shape[1] * 8))
        return AffineWeight(
            (rows, cols),
            lambda start, stop: unpack(packed[start:stop], 4),
            scale[:, :groups],
            unpack(zero, 4)[:, :groups],
            neighbours(cols, size),
            AWQ_BITS,
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
        return matrix_shape(stored, "weight")

    def beside(self, stored: StoredParts) -> dict[str, set[Shape] | None]:
        part, shape = self._scale(stored), matrix_shape(stored, "weight")
        if self.block is not None:
            return {part: scale_shapes(shape, "block", self.block)}
        return {part: scale_shapes(shape, "tensor") | scale_shapes(shape, "channel")}

    @staticmethod
    def _scale(stored: StoredParts) -> str:
        return "weight_scale_inv" if stored.has("weight_scale_inv") else "weight_scale"

    def read(self, stored: StoredParts) -> AffineWeight:
        weight = matrix(stored, "weight", FLOAT8)
        part = self._scale(stored)
        scale = stored.read(part, SCALES)
        if self.block is not None:
            strategy = "block"
        else:
            strategy = "tensor" if scale.numel() == 1 else "channel"
        rows, cols = weight.shape
        return AffineWeight(
            (rows, cols),
            lambda start, stop: weight[start:stop],
            scale_rows(stored, part, scale, (rows, cols), strategy, self.block),
            index=None if self.block is None else neighbours(cols, self.block[1]),
        )


def _unpack_awq(words: Tensor) -> Tensor:
    """Return the values in words ``[n, outputs / 8]`` of AWQ as uint8 ``[outputs, n]``."""
    turned = words.t().contiguous()
    result = torch.empty(turned.shape[0], 8, turned.shape[1], dtype=torch.uint8)
    for position, output in enumerate(AWQ_ORDER):
        result[:, output] = (turned >> (4 * position)) & 15
    return result.flatten(0, 1)
