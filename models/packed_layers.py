"""Linears on weights that stay packed. `WeightPlacement` imports this module where kernels run."""

from __future__ import annotations

from torch import Tensor

from minserve.kernels.packed_linear import packed_linear
from minserve.kernels.packed_matrix import PackedMatrix


class PackedLinear:
    """``x W^T + b`` with a weight that is unpacked as it is multiplied."""

    __slots__ = ("bias", "matrix")

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None) -> None:
        self.matrix = matrix
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.matrix, self.bias)
