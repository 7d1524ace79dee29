"""RMSNorm at the sizes of real models, alone and behind a residual addition."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_exact_as

from minserve.kernels.triton.rms_norm import rms_norm
from minserve.models.layers import RMSNorm

EPS = 1e-5
# Rows by width: a tiny model's, SmolLM2's, those of Llama-3-8B and 70B, the widest served.
SHAPES = [(123, 64), (5, 576), (5, 4096), (1, 8192), (1, 16384), (0, 4096)]


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_is_as_exact_as_torch(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(device, dtype)
    weight = (torch.rand(shape[1]) + 0.5).to(device, dtype)
    plain = RMSNorm(weight, EPS)(x)
    assert_as_exact_as(plain, rms_norm(x, weight, EPS), exact_norm(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_takes_the_rounded_sum_and_the_norm_is_of_that(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(1)
    x, residual = ((torch.randn(shape) * 3).to(device, dtype) for _ in range(2))
    weight = (torch.rand(shape[1]) + 0.5).to(device, dtype)
    summed, untouched = residual + x, x.clone()
    got = rms_norm(x, weight, EPS, residual)
    assert torch.equal(residual, summed)
    assert torch.equal(x, untouched)
    assert torch.equal(got, rms_norm(summed, weight, EPS))  # not of the sum before rounding
    assert_as_exact_as(RMSNorm(weight, EPS)(summed), got, exact_norm(summed, weight))


def test_rows_of_zeros_give_zeros(device: torch.device) -> None:
    x = torch.zeros(3, 768, device=device)
    assert not rms_norm(x, torch.ones(768, device=device), EPS).any()


def test_heads_within_a_wider_row_are_replaced_in_place_each_by_its_own_weight(
    dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    qkv = (torch.randn(5, 8, 128) * 3).to(device, dtype)
    weight = torch.rand(6, 128).to(device) + 0.5
    heads, before = qkv[:, :6], qkv.clone()
    plain = RMSNorm(weight, EPS)(before[:, :6])
    got = rms_norm(heads, weight, EPS, out=heads)
    assert got is heads
    assert_as_exact_as(plain, got, exact_norm(before[:, :6], weight))
    assert torch.equal(qkv[:, 6:], before[:, 6:])
