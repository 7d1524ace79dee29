"""The arithmetic that makes quantized weights float32 again, and the tensors that it reads.

All forms are affine: a weight is ``(value - zero) * scale``, where zero and scale are constant in
a group of weights. The product is computed in float32. Values have at most 8 bits and scales of 16
bits at most 11, so float32 holds it exactly then; with float32 scales it is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
Shape = tuple[int, ...]


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


@dataclass(frozen=True, slots=True)
class AffineWeight:
    """A quantized weight whose tensors were read, and whose values are still packed.

    Attributes:
        shape: rows (outputs) and columns (inputs) of the weight.
        values: returns the stored values of the rows from start to stop, ``[stop - start, at
            least columns]``; start is a multiple of 8, and stop as well or the number of rows.
        scale: ``[rows, groups]`` of any float dtype.
        zero: like ``scale``, of any number dtype; ``None`` for 0.
        index: int64 ``[columns]``, the group of each column; ``None`` if groups are neighbouring
            columns, equally many each.
        bits: of a stored value.
    """

    shape: tuple[int, int]
    values: Callable[[int, int], Tensor]
    scale: Tensor
    zero: Tensor | None = None
    index: Tensor | None = None
    bits: int = 8

    def dense(self) -> Tensor:
        """Return ``(values - zero) * scale`` in float32, computed a few rows at a time."""
        cols = self.shape[1]
        result = torch.empty(self.shape, dtype=torch.float32)
        for start, stop in self.steps():
            part = result[start:stop]
            part.copy_(self.values(start, stop)[:, :cols])
            if self.index is None:
                part = part.view(stop - start, self.scale.shape[1], -1)
            for number, change in ((self.zero, part.sub_), (self.scale, part.mul_)):
                if number is not None:
                    some = number[start:stop].float()
                    change(some.unsqueeze(-1) if self.index is None else some[:, self.index])
        return result

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yield the starts and stops of rows that are unpacked together."""
        rows, cols = self.shape
        step = max(8, CHUNK // max(1, cols) // 8 * 8)
        for start in range(0, rows, step):
            yield start, min(rows, start + step)


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


def neighbours(cols: int, size: int) -> Tensor | None:
    """Return the `AffineWeight.index` of groups of neighbouring columns; the last may be smaller."""
    return torch.arange(cols) // size if cols % size else None


def group_index(
    stored: StoredParts, part: str, index: Tensor, size: int, groups: int
) -> Tensor | None:
    """Return the `AffineWeight.index` for stored numbers of groups, ``[columns]``.

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


def scale_shapes(
    shape: tuple[int, int], strategy: str, block: tuple[int, int] | None = None
) -> set[Shape]:
    """Return the shapes that scales may have; for the arguments see `scale_rows`."""
    wanted = _scale_shape(shape, strategy, block)
    if block:
        return {wanted}
    # A single scale of a tensor or row may lack a dimension.
    return {wanted, wanted[:1]} | ({(), (1,)} if math.prod(wanted) == 1 else set())


def _scale_shape(
    shape: tuple[int, int], strategy: str, block: tuple[int, int] | None
) -> tuple[int, int]:
    rows, cols = shape
    height, width = block or (rows if strategy == "tensor" else 1, cols)
    return math.ceil(rows / height), math.ceil(cols / width)


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
    wanted = _scale_shape(shape, strategy, block)
    if tuple(scale.shape) not in scale_shapes(shape, strategy, block):
        stored.fail(
            part,
            f"has shape {tuple(scale.shape)}, but a weight {tuple(shape)} with one scale a "
            f"{strategy} needs {wanted}",
        )
    height = math.ceil(shape[0] / wanted[0]) if block is None else block[0]
    return scale.float().reshape(wanted).repeat_interleave(height, 0)[: shape[0]]
