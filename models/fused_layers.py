"""Norms as Triton kernels. `Placement` imports this where kernels are asked for."""

from __future__ import annotations

from torch import Tensor

from minserve.kernels.triton.layer_norm import layer_norm
from minserve.kernels.triton.rms_norm import rms_norm
from minserve.models.layers import LAYER_NORM_EPS, Norm


class FusedRMSNorm(Norm):
    """`RMSNorm` in one kernel, with the residual addition before it."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self(x), x
        return rms_norm(x, self.weight, self.eps, residual), residual


class FusedLayerNorm(Norm):
    """`LayerNorm` in one kernel, with the residual addition before it."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, LAYER_NORM_EPS)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self(x), x
        return layer_norm(x, self.weight, self.bias, LAYER_NORM_EPS, residual), residual
