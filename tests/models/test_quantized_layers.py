"""Int8 linears stay within the error that rounding to 8 bits allows, token by token."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from minserve.errors import ConfigError
from minserve.models.layers import WeightFormat, WeightPlacement
from minserve.models.quantized_layers import Int8Linear, quantize_rows, rotate, rotation

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def bound(x: torch.Tensor, weight: torch.Tensor, linear: Int8Linear) -> torch.Tensor:
    """Largest error of each output: no activation is off by more than a step of its token's
    grid, no weight by more than half a step of its row's.
    """
    x, weight = (rotate(one, linear.rotation).double() for one in (x, weight))
    step = 2 * x.abs().amax(1, keepdim=True) / (127 if linear.reduce_range else 255)
    half = weight.abs().amax(1, keepdim=True) / 254
    by_activations = step * weight.abs().sum(1)
    by_weights = x.abs().sum(1, keepdim=True) * half.T
    return by_activations + by_weights + step * half.T * x.shape[1] + 1e-5


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (961, 101), (3, 5)])
def test_products_are_within_the_bound_of_rounding(
    shape: tuple[int, int], biased: bool, rows: int
) -> None:
    weight, x = normal(*shape), normal(rows, shape[1], seed=1)
    bias = normal(shape[0], seed=2) if biased else None
    linear = Int8Linear(weight, bias)
    want, got = exact(x, weight, bias), linear(x)
    assert got.dtype is torch.float32
    assert ((got - want).abs() <= bound(x, weight, linear)).all()
    # The bound holds for the worst signs; by chance errors cancel out to a hundredth of it.
    assert (got - want).norm() < 0.03 * want.norm()


def test_a_token_keeps_its_precision_beside_one_a_thousand_times_larger() -> None:
    weight, x = normal(48, 96), normal(8, 96, seed=1)
    x[3] *= 1000
    linear = Int8Linear(weight, None)
    want, got = exact(x, weight, None), linear(x)
    errors = (got - want).norm(dim=1) / want.norm(dim=1)
    assert errors.max() < 0.03


@pytest.mark.parametrize("rows", [1, 5])
def test_a_channel_that_stands_out_costs_the_others_little(rows: int) -> None:
    weight, x = normal(48, 96), normal(rows, 96, seed=1)
    x[:, 17] = 100.0
    weight[:, 17] = 0.0  # so that the product is that of the others alone
    want, got = exact(x, weight, None), Int8Linear(weight, None)(x)
    # A step of a grid up to 100 is 0.8, near the others' own size: 0.2 of the result is lost.
    # CPUs without VNNI have a coarser grid.
    assert (got - want).norm() < 0.15 * want.norm()


@pytest.mark.parametrize(("width", "group"), [(96, 32), (576, 32), (80, 16), (101, 1), (6, 2)])
def test_a_rotation_is_its_own_inverse(width: int, group: int) -> None:
    matrix = rotation(width)
    assert len(matrix) == group
    torch.testing.assert_close(matrix @ matrix, torch.eye(group))
    x = normal(3, width)
    torch.testing.assert_close(rotate(rotate(x, matrix), matrix), x)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_tokens_of_zeros_give_the_bias(rows: int) -> None:
    bias = normal(48)
    got = Int8Linear(normal(48, 96, seed=1), bias)(torch.zeros(rows, 96))
    assert torch.equal(got, bias.expand(rows, 48))


@pytest.mark.parametrize("rows", [1, 5])
def test_inputs_are_left_as_they_are_and_outputs_have_their_dtype(rows: int) -> None:
    linear = Int8Linear(normal(48, 96), normal(48))
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(rows, 96, seed=1).to(dtype)
        before = x.clone()
        assert linear(x).dtype is dtype
        assert torch.equal(x, before)


def test_rows_of_a_view_are_read_in_their_order() -> None:
    linear, wide = Int8Linear(normal(48, 96), None), normal(5, 200, seed=1)
    view = wide[:, 50:146]
    assert torch.equal(linear(view), linear(view.contiguous()))


def test_weights_are_quantized_by_rows_to_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.models.quantized_layers._CHUNK_ROWS", 4)
    weight = normal(10, 33) * torch.logspace(-3, 3, 10)[:, None]
    weight[6] = 0
    values, scales = quantize_rows(weight.bfloat16(), rotation(33))
    assert values.abs().amax(1).tolist() == [127] * 6 + [0] + [127] * 3
    off = (values * scales[:, None] - weight.bfloat16().float()).abs()
    assert (off <= scales[:, None] * 0.5001).all()


def test_reduced_range_is_right_where_sixteen_bits_would_overflow() -> None:
    """In a process that lets FBGEMM use AVX2 alone, with the largest values on both sides."""
    script = (
        "import torch\n"
        "torch.cpu._is_vnni_supported = lambda: False\n"
        "from minserve.models.quantized_layers import Int8Linear\n"
        "linear = Int8Linear(torch.ones(48, 96), None)\n"
        "for rows in (1, 5):\n"
        "    got = linear(torch.ones(rows, 96))\n"
        "    assert (got - 96).abs().max() < 1, got\n"
    )
    env = os.environ | {
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=120)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_int8_takes_the_place_of_the_linears_form_alone(dtype: str) -> None:
    plain = WeightPlacement.choose(CPU, dtype)
    quantized = WeightPlacement.choose(CPU, dtype, quantization="int8")
    assert quantized.format is WeightFormat.FBGEMM_INT8
    assert quantized.linear_dtype is torch.int8
    assert plain.linear_dtype is plain.weight_dtype
    assert (quantized.dtype, quantized.weight_dtype) == (plain.dtype, plain.weight_dtype)
    x = normal(5, 96).to(plain.dtype)
    assert quantized.linear(normal(48, 96), normal(48))(x).dtype is plain.dtype


def test_int8_is_refused_on_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--device cpu"):
        WeightPlacement.choose(torch.device("cuda"), "float16", quantization="int8")


def test_int8_is_refused_where_torch_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.models.layers.int8_is_supported", lambda: False)
    with pytest.raises(ConfigError, match="leave --quantization out"):
        WeightPlacement.choose(CPU, "float32", quantization="int8")
