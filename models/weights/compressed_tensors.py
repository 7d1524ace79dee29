"""The format compressed-tensors: weights as llm-compressor stores them.

A quantized linear has either ``weight_packed`` (values of 2, 4 or 8 bits in 32-bit words along the
inputs, each plus half of its range) with ``weight_shape``, or ``weight`` in int8 or an 8 bit float.
``weight_scale`` has the scales. Where values are not symmetric, ``weight_zero_point`` has the
zeros; packed ones lie in words along the outputs. ``weight_g_idx`` names the group of each input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minserve.models.weights.affine import (
    FLOAT8,
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
from minserve.models.weights.packed_formats import PackedFormat

STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Scheme:
    """How the linears of one configuration group are quantized.

    Attributes:
        targets: names of linears, regular expressions after ``re:``, or classes such as Linear.
        bits: of a value.
        is_float: true for 8 bit floats.
        symmetric: true if all zeros are 0.
        strategy: what one scale is for: one of `STRATEGIES`.
        block: outputs and inputs of a block or group; ``None`` where the strategy says it all.
        act_order: true if groups are not neighbouring inputs.
    """

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    block: tuple[int, int] | None
    act_order: bool


class CompressedTensorsFormat(PackedFormat):
    """Weights in the format compressed-tensors."""

    title = "compressed-tensors"
    marks = ("weight_packed", "weight_scale")
    parts = (
        *("weight_packed", "weight", "weight_scale"),
        *("weight_shape", "weight_zero_point", "weight_g_idx"),
    )

    def __init__(
        self, title: str, schemes: Sequence[Scheme], ignore: Sequence[str], notes: Sequence[str]
    ) -> None:
        """``ignore``: linears that are not quantized, in the words of `Scheme.targets`."""
        self.title = title
        self.notes = tuple(notes)
        self._schemes = tuple(schemes)
        self._ignore = tuple(ignore)

    def shape(self, stored: StoredParts) -> tuple[int, ...]:
        return self._shape(stored) if stored.has("weight_packed") else stored.shape("weight")

    def beside(self, stored: StoredParts) -> dict[str, set[Shape] | None]:
        scheme = self._scheme(stored)
        packed = stored.has("weight_packed")
        wanted: dict[str, set[Shape] | None] = {}
        if packed and not stored.has("weight_shape"):
            return {"weight_shape": None, "weight_scale": None}
        shape = self._shape(stored) if packed else matrix_shape(stored, "weight")
        rows, cols = shape
        if packed:
            wanted["weight_packed"] = {(rows, math.ceil(cols * scheme.bits / 32))}
        scales = scale_shapes(shape, scheme.strategy, scheme.block)
        wanted["weight_scale"] = scales
        if not scheme.symmetric:
            words = {(math.ceil(rows * scheme.bits / 32), max(scales, key=len)[-1])}
            wanted["weight_zero_point"] = scales | words if packed else scales
        if scheme.act_order:
            wanted["weight_g_idx"] = {(cols,)}
        return wanted

    def read(self, stored: StoredParts) -> AffineWeight:
        scheme = self._scheme(stored)
        if not stored.has("weight_packed"):
            return self._plain(stored, scheme)
        if scheme.is_float:
            stored.fail("weight_packed", "is packed, but its settings say that it holds floats")
        rows, cols = shape = self._shape(stored)
        packed = stored.read("weight_packed", PACKED, (rows, math.ceil(cols * scheme.bits / 32)))
        scale = _grouped(stored, "weight_scale", stored.read("weight_scale", SCALES), shape, scheme)
        half = 1 << (scheme.bits - 1)
        zero = torch.full((1, 1), half).expand(scale.shape)
        if not scheme.symmetric:
            zero = _packed_zero(stored, shape, scheme, half)
        return AffineWeight(
            shape,
            lambda start, stop: unpack(packed[start:stop], scheme.bits),
            scale,
            zero,
            _index(stored, cols, scale.shape[1], scheme),
            scheme.bits,
        )

    def _plain(self, stored: StoredParts, scheme: Scheme) -> AffineWeight:
        weight = matrix(stored, "weight", FLOAT8 if scheme.is_float else (torch.int8,))
        shape = (weight.shape[0], weight.shape[1])
        scale = _grouped(stored, "weight_scale", stored.read("weight_scale", SCALES), shape, scheme)
        zero = None
        if not scheme.symmetric:
            part = "weight_zero_point"
            zero = _grouped(stored, part, stored.read(part, INTEGERS), shape, scheme)
        index = _index(stored, shape[1], scale.shape[1], scheme)
        return AffineWeight(shape, lambda start, stop: weight[start:stop], scale, zero, index)

    def _shape(self, stored: StoredParts) -> tuple[int, int]:
        rows, cols = stored.read("weight_shape", INTEGERS, (2,)).tolist()
        if rows < 1 or cols < 1:
            stored.fail("weight_shape", f"says ({rows}, {cols}), which is no weight's shape")
        return rows, cols

    def _scheme(self, stored: StoredParts) -> Scheme:
        """Return a linear's scheme: one that names it, else one whose pattern fits, else one for
        its class.
        """
        mark = next(part for part in self.marks if stored.has(part))
        if any(_fits(target, stored.name) for target in self._ignore):
            stored.fail(mark, "is quantized, but the settings' ignore list has it")
        ranked = sorted(
            (rank, number)
            for number, scheme in enumerate(self._schemes)
            for target in scheme.targets
            if (rank := _fits(target, stored.name))
        )
        if not ranked:
            stored.fail(mark, "is quantized, but no config group's targets fit it")
        return self._schemes[ranked[0][1]]


def _fits(target: str, name: str) -> int:
    """Return how a target fits a linear: 1 by its name, 2 by a pattern, 3 by class, 0 not at all.

    A pattern fits if it matches from the start of the name. A word without dots that begins with a
    capital is a class; all classes of linears count as Linear.
    """
    if target.startswith("re:"):
        return 2 if re.match(target[3:], name) else 0
    if target == name:
        return 1
    return 3 if re.fullmatch(r"[A-Z]\w*Linear|Linear", target) else 0


def _grouped(
    stored: StoredParts, part: str, numbers: Tensor, shape: tuple[int, int], scheme: Scheme
) -> Tensor:
    """Return scales or zeros as float32 ``[rows, groups]``."""
    return scale_rows(stored, part, numbers, shape, scheme.strategy, scheme.block)


def _packed_zero(stored: StoredParts, shape: tuple[int, int], scheme: Scheme, half: int) -> Tensor:
    """Return the zeros of a packed weight, plus half of the values' range, ``[rows, groups]``."""
    part, rows = "weight_zero_point", shape[0]
    zero = stored.read(part, (torch.int8, torch.int32))
    if zero.dtype is torch.int8:  # one tensor's zero, and those of the format's first versions
        return _grouped(stored, part, zero, shape, scheme) + half
    if zero.dim() != 2 or zero.shape[0] != math.ceil(rows * scheme.bits / 32):
        stored.fail(part, f"has shape {tuple(zero.shape)}, which does not fit a weight {shape}")
    return _grouped(stored, part, unpack(zero.t(), scheme.bits)[:, :rows].t(), shape, scheme)


def _index(stored: StoredParts, cols: int, groups: int, scheme: Scheme) -> Tensor | None:
    size = scheme.block[1] if scheme.block else cols
    if not scheme.act_order:
        return neighbours(cols, size)
    index = stored.read("weight_g_idx", INTEGERS, (cols,))
    if bool((index == -1).all()):  # never set: the inputs are in their order
        return neighbours(cols, size)
    return group_index(stored, "weight_g_idx", index, size, groups)
