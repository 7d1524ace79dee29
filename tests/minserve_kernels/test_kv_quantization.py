"""Keys and values in 8 bits: the nearest numbers there are, and forms that a device has."""

from __future__ import annotations

import pytest
import torch

from minserve.errors import ConfigError
from minserve.kernels.kv_quantization import (
    FP8,
    INT8,
    KVForm,
    check_kv_cache_dtype,
    head_bytes,
    quantize,
    raw,
)

FORMS = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])


def numbers_of(form: KVForm) -> torch.Tensor:
    """All finite numbers of a form, in float64, ascending."""
    every = torch.arange(-128, 128).to(torch.int8).view(form.dtype).double()
    return every[every.abs() <= form.largest].unique()


@FORMS
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_each_value_becomes_the_nearest_number_of_its_heads_scale(form: KVForm, size: float):
    torch.manual_seed(0)
    heads = size * torch.randn(5, 3, 64)
    stored, scales = quantize(heads, form)
    assert (stored.dtype, scales.dtype, scales.shape) == (form.dtype, torch.float32, (5, 3))
    read = stored.double() * scales.double().unsqueeze(-1)
    grid = scales.double()[..., None, None] * numbers_of(form)
    nearest = (heads.double().unsqueeze(-1) - grid).abs().amin(-1)
    assert torch.allclose((heads - read).abs(), nearest, atol=1e-6 * size)
    # The largest value of each head uses the form's whole range.
    assert (stored.float().abs().amax(-1) == form.largest).all()


@FORMS
@pytest.mark.parametrize("value", [0.0, 1e-44, -3e-39])
def test_heads_of_zeros_and_of_next_to_nothing_stay_finite(form: KVForm, value: float):
    stored, scales = quantize(torch.full((2, 16), value), form)
    assert (stored.float() * scales.unsqueeze(1) - value).abs().max() < 1e-38


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_in_half_precision_are_read_as_they_are(form: KVForm, dtype: torch.dtype):
    heads = torch.randn(4, 32).to(dtype)
    wide = quantize(heads.float(), form)
    for got, want in zip(quantize(heads, form), wide, strict=True):
        assert torch.equal(raw(got), raw(want))


def test_a_head_takes_half_of_16_bits_and_a_scale() -> None:
    assert head_bytes(128, torch.bfloat16, "auto") == 256
    assert head_bytes(128, torch.bfloat16, "int8") == head_bytes(128, torch.float32, "fp8") == 132


def test_fp8_is_refused_where_the_gpu_has_no_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match="use --kv-cache-dtype int8"):
        check_kv_cache_dtype("fp8", "triton", gpu)
    check_kv_cache_dtype("int8", "triton", gpu)
    check_kv_cache_dtype("fp8", "torch", gpu)
    check_kv_cache_dtype("fp8", "triton", torch.device("cpu"))
    capability = (8, 9)
    check_kv_cache_dtype("fp8", "triton", gpu)
