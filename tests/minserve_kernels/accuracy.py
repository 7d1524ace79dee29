"""How exact a kernel must be."""

from __future__ import annotations

from torch import Tensor


def assert_as_exact_as(plain: Tensor, got: Tensor, exact: Tensor) -> None:
    """At most twice the error of the plain computation in the same dtype, and the same dtype.

    Besides, what float32 sums lose: a kernel adds up thousands of products one after the
    other, and torch in a tree.

    Args:
        exact: float64, computed from the same (rounded) inputs.
    """
    assert got.dtype is plain.dtype
    assert got.shape == exact.shape
    if exact.numel():
        tiny = 4e-6 * exact.abs().max()
        error, allowed = ((x.double() - exact).abs().max() for x in (got, plain))
        assert error <= 2 * allowed + tiny
