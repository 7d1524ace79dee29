"""`PackedTensor`: a quantized weight that a model handles as a tensor, and that stays packed.

Families join, split, reorder and scale the weights that they read. All of this is done to rows, and
so to the rows of the packed values. Whatever else is done to such a tensor is done to the float32
weight that it stands for. So a family's code need not know of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minserve.kernels.packed_matrix import PackedMatrix, ValueKind, pack_matrix, packed_group
from minserve.models.weights.affine import AffineWeight

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A quantized weight by rows, one octet for each value.

    Attributes:
        values: uint8 ``[out, in]``: whole numbers, or the bits of floats.
        scale: ``[out, groups]`` in the shortest float dtype that holds it.
        zero: uint8 ``[out, groups]``; ``None`` if all are the kind's middle.
        size: inputs of a group; ``None`` for one group.
        order: int64 ``[in]``: which inputs the columns belong to; ``None`` if they are in order.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    size: int | None
    order: Tensor | None
    kind: ValueKind

    @classmethod
    def of(cls, weight: AffineWeight) -> PackedRows | None:
        """Return a weight by rows; ``None`` where the kernels know no such weight."""
        sample = weight.values(0, min(8, weight.shape[0]))
        kind = _kind(sample, weight)
        grouping = _grouping(weight.index, weight.shape[1], weight.scale.shape[1])
        if kind is None or grouping is None:
            return None
        size, order = grouping
        if size is not None and packed_group(size, kind) is None:
            return None
        values = torch.empty(weight.shape, dtype=torch.uint8)
        for start, stop in weight.steps():
            part = weight.values(start, stop)[:, : weight.shape[1]]
            if part.dtype is torch.int8:
                part = (part.to(torch.int16) + kind.middle).to(torch.uint8)
            part = part.view(torch.uint8)
            values[start:stop] = part if order is None else part[:, order]
        zero = None
        if kind is not ValueKind.FP8:
            zero = _zeros(weight, kind, is_signed=sample.dtype is torch.int8)
            if zero is None:
                return None
            if bool((zero == kind.middle).all()):
                zero = None
        return cls(values, _shortest(weight.scale), zero, size, order, kind)

    def select(self, rows: Any) -> PackedRows:
        """Return some of the rows, or all in another order."""
        zero = None if self.zero is None else self.zero[rows]
        return replace(self, values=self.values[rows], scale=self.scale[rows], zero=zero)

    def columns(self, start: int, stop: int) -> PackedRows | None:
        """Return the inputs from start to stop; ``None`` where these are no weight for the kernels.

        Groups that are cut become several smaller ones.
        """
        values = self.values[:, start:stop]
        if self.size is None:
            order = None if self.order is None else self.order[start:stop]
            return None if order is not None else replace(self, values=values)
        end = self.size if stop == self.values.shape[1] else stop
        size = math.gcd(self.size, start, end)
        if self.order is not None or packed_group(size, self.kind) is None:
            return None
        groups = slice(start // size, math.ceil(stop / size))
        scale, zero = (
            None if one is None else one.repeat_interleave(self.size // size, 1)[:, groups]
            for one in (self.scale, self.zero)
        )
        assert scale is not None
        return replace(self, values=values, scale=scale, zero=zero, size=size)

    def fits(self, other: PackedRows) -> bool:
        """Tell whether the rows of both can be those of one matrix."""
        if self.order is None or other.order is None:
            same_order = self.order is other.order
        else:
            same_order = torch.equal(self.order, other.order)
        alike = (self.kind, self.size, self.scale.shape[1], self.values.shape[1])
        return same_order and alike == (
            other.kind, other.size, other.scale.shape[1], other.values.shape[1]
        )  # fmt: skip

    def zeros(self) -> Tensor:
        """Return the zeros, uint8 ``[out, groups]``."""
        if self.zero is not None:
            return self.zero
        return torch.full(self.scale.shape, self.kind.middle, dtype=torch.uint8)

    def dense(self) -> Tensor:
        """Return the weight in float32."""
        values, zero = self.values, self.zeros()
        if self.kind is ValueKind.FP8:
            values = values.view(torch.float8_e4m3fn)
        cols = values.shape[1]
        group = torch.arange(cols) // (self.size or cols)
        weight = (values.float() - zero.float()[:, group]) * self.scale.float()[:, group]
        if self.order is None:
            return weight
        result = torch.empty_like(weight)
        result[:, self.order] = weight
        return result

    def matrix(self, device: torch.device) -> PackedMatrix:
        """Return the weight as the kernels read it. It is packed on the device, in no time."""
        return pack_matrix(
            self.values.to(device),
            self.scale.to(device),
            None if self.zero is None else self.zero.to(device),
            size=self.size,
            kind=self.kind,
            order=None if self.order is None else self.order.to(device),
        )


class PackedTensor(Tensor):
    """A float32 weight ``[out, in]`` on the CPU that is kept as `PackedRows`."""

    rows: PackedRows

    @staticmethod
    def of(rows: PackedRows) -> PackedTensor:
        """Return the tensor of a packed weight."""
        # The tensor itself has no memory, only a shape.
        shell = torch.empty(rows.values.shape, dtype=torch.float32, device="meta")
        tensor = Tensor._make_subclass(PackedTensor, shell)
        tensor.rows = rows
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _OF_ROWS:
            result = _OF_ROWS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = _dense(args), _dense(kwargs)
        return func(*args, **kwargs)


def _dense(some: Any) -> Any:
    """Return arguments with plain tensors in the place of packed ones."""
    if isinstance(some, PackedTensor):
        return some.rows.dense()
    if isinstance(some, list | tuple):
        return type(some)(_dense(one) for one in some)
    if isinstance(some, dict):
        return {name: _dense(one) for name, one in some.items()}
    return some


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    if len(tensors) == 1:
        return tensors[0]
    packed = [one.rows for one in tensors if isinstance(one, PackedTensor)]
    if dim != 0 or len(packed) < len(tensors) or not all(packed[0].fits(one) for one in packed):
        log.warning(
            "linears that are run as one are quantized in different ways, so %s are unpacked; "
            "they take the memory of unquantized ones",
            " and ".join(f"{len(one)} outputs" for one in tensors),
        )
        return NotImplemented
    zero = None
    if any(one.zero is not None for one in packed):
        zero = torch.cat([one.zeros() for one in packed])
    dtypes = {one.scale.dtype for one in packed}
    wide = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return PackedTensor.of(
        replace(
            packed[0],
            values=torch.cat([one.values for one in packed]),
            scale=torch.cat([one.scale.to(wide) for one in packed]),
            zero=zero,
        )
    )


def _split(tensor: PackedTensor, sizes: Any, dim: int = 0) -> Any:
    if dim != 0:
        return NotImplemented
    parts = torch.arange(len(tensor)).split(sizes)
    return tuple(PackedTensor.of(tensor.rows.select(part)) for part in parts)


def _index(tensor: Tensor, rows: Any) -> Any:
    if isinstance(tensor, PackedTensor) and isinstance(rows, tuple):
        return _columns(tensor, *rows)
    if not isinstance(tensor, PackedTensor) or isinstance(rows, int):
        return NotImplemented
    return PackedTensor.of(tensor.rows.select(rows))


def _columns(tensor: PackedTensor, rows: Any, columns: Any) -> Any:
    if rows != slice(None) or not isinstance(columns, slice):
        return NotImplemented
    start, stop, _ = columns.indices(tensor.shape[1])
    kept = tensor.rows.columns(start, stop)
    if kept is not None:
        return PackedTensor.of(kept)
    log.warning(
        "a linear of %d inputs is unpacked, because a rank's share of them, %d, cuts groups that the "
        "kernels need whole; it takes the memory of an unquantized one",
        tensor.shape[1],
        stop - start,
    )
    return NotImplemented


def _times(tensor: Tensor, factor: Any) -> Any:
    if not isinstance(tensor, PackedTensor) or not isinstance(factor, int | float):
        return NotImplemented
    scale = tensor.rows.scale.float() * factor
    return PackedTensor.of(replace(tensor.rows, scale=scale))


# What only asks for a shape or dtype.
_OF_SHAPES = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
}
# What is done to rows. A weight is float32 already.
_OF_ROWS: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    Tensor.split: _split,
    Tensor.__getitem__: _index,
    Tensor.mul: _times,
    Tensor.__mul__: _times,
    Tensor.float: lambda tensor, **_: tensor,
}


def _kind(sample: Tensor, weight: AffineWeight) -> ValueKind | None:
    """Return what stored values are."""
    if sample.dtype is torch.float8_e4m3fn:
        return ValueKind.FP8 if weight.zero is None else None
    if sample.dtype is torch.int8:
        return ValueKind.INT8
    if sample.dtype is not torch.uint8:
        return None
    # Words hold whole octets' worth of values: of 2, 4 or 8 bits.
    return ValueKind.INT4 if weight.bits <= ValueKind.INT4.bits else ValueKind.INT8


def _grouping(
    index: Tensor | None, cols: int, groups: int
) -> tuple[int | None, Tensor | None] | None:
    """Return the size of groups, and the order in which their inputs are neighbours.

    ``None`` if groups have other numbers of inputs than a size, and a rest for the last one.
    """
    if groups == 1:
        return None, None
    if index is None:
        return cols // groups, None
    size = int(index.bincount(minlength=groups).max())
    wanted = torch.arange(cols) // size
    if torch.equal(index, wanted):
        return size, None
    order = index.argsort(stable=True)
    return (size, order) if torch.equal(index[order], wanted) else None


def _zeros(weight: AffineWeight, kind: ValueKind, *, is_signed: bool) -> Tensor | None:
    """Return the zeros in uint8, as for values without a sign; ``None`` if one does not fit."""
    zero = torch.zeros(1, 1) if weight.zero is None else weight.zero.float()
    zero = (zero + (kind.middle if is_signed else 0)).expand(weight.scale.shape)
    octets = zero.clamp(0, 255).to(torch.uint8)
    return octets if torch.equal(octets.float(), zero) else None


def _shortest(scale: Tensor) -> Tensor:
    """Return scales in the shortest dtype that holds all of them."""
    wide = scale.float()
    for dtype in (torch.float16, torch.bfloat16):
        short = wide.to(dtype)
        if torch.equal(short.float(), wide):
            return short.contiguous()
    return wide.contiguous()
