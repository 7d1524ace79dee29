"""Norms as Triton kernels. `Placement` imports this module where kernels are asked for."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from minserve.kernels.triton.layer_norm import layer_norm
from minserve.kernels.triton.rms_norm import rms_norm
from minserve.models.layers import LAYER_NORM_EPS, Norm


class FusedNorm(Norm):
    """A norm and the residual addition before it, in one kernel.

    Args:
        kernel: returns the norm of ``x``, or of ``residual + x``; it leaves the sum in
            ``residual``.
    """

    __slots__ = ("_kernel",)

    def __init__(self, kernel: partial[Tensor]) -> None:
        self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernel(x)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._kernel(x, residual=residual), x if residual is None else residual

    def replace(self, x: Tensor) -> None:
        self._kernel(x, out=x)


def fused_rms_norm(weight: Tensor, eps: float) -> FusedNorm:
    """Return an `RMSNorm` in one kernel."""
    return FusedNorm(partial(rms_norm, weight=weight, eps=eps))


def fused_layer_norm(weight: Tensor | None, bias: Tensor | None) -> FusedNorm:
    """Return a `LayerNorm` in one kernel."""
    return FusedNorm(partial(layer_norm, weight=weight, bias=bias, eps=LAYER_NORM_EPS))
