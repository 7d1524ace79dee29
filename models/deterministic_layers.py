"""Layers on a CPU whose result for a row does not depend on the other rows, to the last bit.

Libraries choose among kernels by the number of rows, and these may add in another order. So a
layer that adds runs on tiles of fixed numbers of rows, the last one filled up. It is tried out
which larger tiles give each row exactly what a small tile gives it; with their help, prompts take
less time. Sums in another order differ in most rows, so that a trial finds them.

Activations are computed number by number, but torch does so in two ways, for whole vectors and
for the numbers that are left at an end, which round otherwise only now and then. No trial would
find that; `SerialRows` leaves no number at an end whose place depends on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minserve.errors import ConfigError
from minserve.kernels.deterministic_backend import MOST_UNDIVIDED
from minserve.models.layers import (
    Activation,
    Linear,
    Norm,
    RMSNorm,
    WeightFormat,
    WeightPlacement,
)

# Numbers of rows, of which the last always serves.
TILES = (64, 32, 16, 8, 4)
SMALL = TILES[-1]
# A multiple of the numbers that any processor computes at once.
WHOLE_VECTORS = 128

Rows = Callable[[Tensor], Tensor]


class RowTiles:
    """A function of rows that gives a row the same wherever, and among whichever, it is.

    Args:
        function: returns a row for each row.
        sizes: numbers of rows for which it gives the same, from `agreeing_sizes`.
    """

    __slots__ = ("_function", "_sizes")

    def __init__(self, function: Rows, sizes: tuple[int, ...]) -> None:
        self._function = function
        self._sizes = sizes

    def __call__(self, x: Tensor) -> Tensor:
        parts, start, rows = [], 0, len(x)
        for size in self._sizes:
            while rows - start >= size:
                parts.append(self._function(x[start : start + size].contiguous()))
                start += size
        if start < rows:
            last = x.new_zeros(SMALL, *x.shape[1:])
            last[: rows - start] = x[start:]
            parts.append(self._function(last)[: rows - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def agreeing_sizes(function: Rows, sample: Tensor) -> tuple[int, ...]:
    """Return those of `TILES` with which a function gives each row the same bits.

    Args:
        sample: random rows, as many as the largest tile has.

    Raises:
        ConfigError: where in a small tile already the other rows or the place make a difference.
    """

    def in_tiles(size: int, x: Tensor) -> Tensor:
        return torch.cat([function(x[i : i + size].contiguous()) for i in range(0, len(x), size)])

    small = in_tiles(SMALL, sample)
    for shift in range(1, SMALL):
        if not torch.equal(in_tiles(SMALL, sample.roll(shift, 0)), small.roll(shift, 0)):
            raise ConfigError(
                "deterministic: on this machine a layer's result for a token depends on its place "
                "among others; try another dtype or number of threads"
            )
    return tuple(size for size in TILES if torch.equal(in_tiles(size, sample), small))


class SerialRows:
    """A function of numbers, or of pairs in one row, that rounds a row the same among any others.

    It gets so few rows at once that torch does not divide them among threads, and these are whole
    vectors; else one row at a time.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Rows) -> None:
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        at_once = 1 if width % WHOLE_VECTORS else max(1, MOST_UNDIVIDED // width)
        if len(x) <= at_once:
            return self._function(x)
        return torch.cat([self._function(some) for some in x.split(at_once)])


class SeparateRMSNorm(RMSNorm):
    """`RMSNorm` without an operation that rounds once or twice, depending on the rows."""

    __slots__ = ()

    def _inverse(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.square_().mul_(self.scale).add_(self.eps).rsqrt_()


class TiledNorm(Norm):
    """A norm over tiles of rows."""

    __slots__ = ("_tiles",)

    def __init__(self, tiles: RowTiles) -> None:
        self._tiles = tiles

    def __call__(self, x: Tensor) -> Tensor:
        return self._tiles(x)


class DeterministicPlacement(WeightPlacement):
    """A placement on a CPU whose layers do not depend on the batch. All of them are `RowTiles`."""

    __slots__ = ()

    @classmethod
    def choose(
        cls,
        device: torch.device,
        dtype: str,
        fused: bool = False,
        *,
        twice: bool = False,  # noqa: ARG003
        quantization: str = "none",
    ) -> WeightPlacement:
        """Return the fastest placement of this kind. Two forms of weights would make the
        arithmetic depend on the number of tokens, and there is none for quantized weights.

        Raises:
            ConfigError: if the device is no CPU.
        """
        if device.type != "cpu" or quantization != "none":
            raise ConfigError(
                "deterministic runs on a CPU without quantization alone, so far: leave it out, or "
                "add --device cpu"
            )
        return super().choose(device, dtype, fused)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return self._tiled(super().linear(weight, bias), "linear", weight.shape)

    def glu(
        self,
        gate: Tensor,
        up: Tensor,
        biases: tuple[Tensor, Tensor] | None = None,
        activation: str = "silu",
    ) -> Linear:
        glu = super().glu(gate, up, biases, activation)
        # Else its parts are in tiles already.
        is_whole = self.format is WeightFormat.ONEDNN
        return self._tiled(glu, activation, gate.shape) if is_whole else glu

    def activated_linear(
        self, weight: Tensor, bias: Tensor | None, activation: Activation
    ) -> Linear:
        if activation is not torch.relu_:  # which rounds nothing
            return super().activated_linear(weight, bias, SerialRows(activation))
        return self._tiled(super().activated_linear(weight, bias, activation), "relu", weight.shape)

    def gate(self, activation: str) -> Activation:
        return SerialRows(super().gate(activation))

    def rms_norm(self, weight: Tensor, eps: float) -> Norm:
        norm = SeparateRMSNorm(weight.to(self.device, torch.float32), eps)
        return TiledNorm(self._tiled(norm, "norm", (1, *weight.shape)))

    def layer_norm(self, size: int, weight: Tensor | None, bias: Tensor | None) -> Norm:
        return TiledNorm(self._tiled(super().layer_norm(size, weight, bias), "norm", (1, size)))

    def _tiled(self, function: Rows, name: str, shape: tuple[int, ...]) -> RowTiles:
        """Return a function in tiles.

        Args:
            name: what it does.
            shape: that of its weight, ``[out, *row]``: layers of one name and shape are tried once.
        """
        key = (name, tuple(shape), self.dtype, self.format, torch.get_num_threads())
        if key not in _sizes:
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(TILES[0], *shape[1:], generator=generator).to(self.dtype)
            _sizes[key] = agreeing_sizes(function, sample)
        return RowTiles(function, _sizes[key])


# The sizes that were found for layers of a kind, in this process.
_sizes: dict[tuple[object, ...], tuple[int, ...]] = {}
