"""LayerNorm at the sizes of OPT, alone and behind a residual addition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as

from minserve.kernels.triton.layer_norm import layer_norm

EPS = 1e-5
# Rows by width: a tiny model's, OPT-125M's, 2.7B's, 6.7B's, 13B's, 30B's.
SHAPES = [(123, 64), (5, 768), (5, 2560), (1, 4096), (1, 5120), (5, 7168), (0, 768)]


def parameters(
    size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.rand(size) + 0.5).to(device, dtype), torch.randn(size).to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_is_as_exact_as_torch(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + 1).to(device, dtype)
    weight, bias = parameters(shape[1], dtype, device)
    plain = F.layer_norm(x, shape[1:], weight, bias, EPS)
    exact = F.layer_norm(x.double(), shape[1:], weight.double(), bias.double(), EPS)
    assert_as_exact_as(plain, layer_norm(x, weight, bias, EPS), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_takes_the_rounded_sum_and_the_norm_is_of_that(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(1)
    x, residual = ((torch.randn(shape) * 3 + 1).to(device, dtype) for _ in range(2))
    weight, bias = parameters(shape[1], dtype, device)
    summed, untouched = residual + x, x.clone()
    got = layer_norm(x, weight, bias, EPS, residual)
    assert torch.equal(residual, summed)
    assert torch.equal(x, untouched)
    assert torch.equal(got, layer_norm(summed, weight, bias, EPS))  # not of the sum before rounding
    plain = F.layer_norm(summed, shape[1:], weight, bias, EPS)
    exact = F.layer_norm(summed.double(), shape[1:], weight.double(), bias.double(), EPS)
    assert_as_exact_as(plain, got, exact)


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weight_and_bias_may_be_absent(
    has_weight: bool, has_bias: bool, device: torch.device
) -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 96, device=device)
    weight, bias = parameters(96, torch.float32, device)
    weight, bias = weight if has_weight else None, bias if has_bias else None
    want = F.layer_norm(x, (96,), weight, bias, EPS)
    torch.testing.assert_close(layer_norm(x, weight, bias, EPS), want, rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_does_not_cancel_the_variance(device: torch.device) -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 768, device=device) + 3e4
    exact = F.layer_norm(x.double(), (768,), None, None, EPS)
    # The mean itself is rounded to 2e-3; the squares of such values to about 60.
    assert (layer_norm(x, None, None, EPS).double() - exact).abs().max() < 1e-2
