"""Linears on int8 weights, for CPUs: half of bfloat16's weight traffic, and int8 arithmetic.

Weights are quantized symmetrically per output channel at load. Activations are quantized per
token at each call, to 8 bits as well, within FBGEMM's kernel, which multiplies integers and
sums them in int32. Weights and activations are rotated first. The product stays the same, and no
channel stands out and takes the precision of the others (QuaRot, Ashkboos et al., 2024).
docs/cpu.md says what this form saves and what it costs.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# Rows that are quantized at once: a head of many rows must not be held in memory in float32.
_CHUNK_ROWS = 8192
# Most channels that are rotated together. More cost time and do not improve quality.
_MOST_ROTATED = 32
_TINY = torch.finfo(torch.float32).tiny
# The operator itself: a call through torch.ops with a packed weight takes microseconds longer.
_fbgemm_int8 = torch.ops.quantized.linear_dynamic.default._op


def int8_is_supported() -> bool:
    """Return whether torch has FBGEMM's kernels on this machine (x86 with AVX2 or newer)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def quantize_rows(weight: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a ``[out, in]`` weight whose groups of columns are rotated.

    Returns:
        int8 values ``[out, in]`` and float32 scales ``[out]``; the weight is about
        ``values * scales[:, None]``.

    Quantization is symmetric, with the largest value of each row at 127, so that no value is
    further off than half of its row's scale.
    """
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0])
    for start in range(0, weight.shape[0], _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        wide = rotate(weight[rows], rotation)
        scale = wide.abs().amax(1).div_(127).clamp_min_(_TINY)
        scales[rows] = scale
        values[rows] = (wide / scale[:, None]).round_()
    return values, scales


def rotation(width: int) -> Tensor:
    """Return a float32 Hadamard matrix for groups of neighbouring channels, ``[group, group]``.

    The matrix is symmetric and its own inverse. The group is the largest power of two, up to 32,
    that divides ``width``.
    """
    group = math.gcd(width, _MOST_ROTATED)
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / group**0.5


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return ``[rows, width]`` in float32, with each group of neighbouring channels rotated."""
    return (x.float().reshape(-1, len(rotation)) @ rotation).view(x.shape)


class Int8Linear:
    """``x W^T + b`` with weight and activations in int8, sums in int32, output in ``x``'s dtype.

    FBGEMM quantizes a batch as a whole, by its smallest and largest value. A token with large
    values must not cost the other tokens their precision. So each token is divided by its own
    largest magnitude first, and the product is multiplied by it.
    """

    __slots__ = ("bias", "packed", "reduce_range", "rotation")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.float()
        self.rotation = rotation(weight.shape[1])
        values, scales = quantize_rows(weight, self.rotation)
        with warnings.catch_warnings():
            # Tensors of quantized dtype are deprecated; FBGEMM's packing takes no other form.
            warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(
                values, scales.double(), torch.zeros(len(scales), dtype=torch.int64), 0
            )
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        # Without VNNI, pairs of products are added in 16 bits, which 8-bit activations overflow.
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def __call__(self, x: Tensor) -> Tensor:
        rotated = rotate(x, self.rotation)
        if len(x) == 1:  # a lone token is the whole batch
            out = self._multiply(rotated)
            if self.bias is not None:
                out.add_(self.bias)
            return out.to(x.dtype)
        largest = rotated.abs().amax(-1, keepdim=True).clamp_min_(_TINY)
        out = self._multiply(rotated.div_(largest))
        if self.bias is None:
            out.mul_(largest)
        else:
            out = torch.addcmul(self.bias, out, largest)
        return out.to(x.dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        """Multiply ``[rows, in]`` by the weight; returns float32 ``[rows, out]``."""
        return _fbgemm_int8(x, self.packed, self.reduce_range)
