"""Products with packed weights: those of the weights that they stand for, at odd sizes too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minserve.kernels import packed_linear as chooser
from minserve.kernels.packed_matrix import PackedMatrix, ValueKind, pack_matrix, packed_group
from minserve.kernels.triton import packed_splits
from minserve.kernels.triton.packed_dequantize import packed_dequantize
from minserve.kernels.triton.packed_gemv import packed_gemv
from minserve.kernels.triton.packed_matmul import packed_matmul

# What float32 sums may lose, and what one rounding to the dtype loses, of the largest result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def weight_of(
    kind: ValueKind,
    outputs: int,
    inputs: int,
    size: int | None,
    device: torch.device,
    *,
    zeros: bool = True,
) -> tuple[PackedMatrix, Tensor]:
    """Return a random packed weight, and what it stands for in float64 by the formats' definition.

    Args:
        size: inputs of a group; ``None`` for one group.
    """
    rng = torch.Generator().manual_seed(0)
    groups = 1 if size is None else -(-inputs // size)
    group = torch.arange(inputs) // (size or inputs)
    scale = (0.01 + 0.02 * torch.rand(outputs, groups, generator=rng)).half()
    most = 1 << kind.bits
    zero = None
    if kind is ValueKind.FP8:
        # Not -0, and not the NaN (all bits 1): every other float, small ones among them.
        values = torch.randint(0, 127, (outputs, inputs), generator=rng).to(torch.uint8)
        values[torch.rand(values.shape, generator=rng) < 0.5] += 128
        exact = values.view(torch.float8_e4m3fn).double()
    else:
        values = torch.randint(0, most, (outputs, inputs), generator=rng).to(torch.uint8)
        middle = torch.full((outputs, groups), most // 2, dtype=torch.uint8)
        if zeros:
            zero = torch.randint(0, most, (outputs, groups), generator=rng).to(torch.uint8)
        exact = values.double() - (middle if zero is None else zero).double()[:, group]
    matrix = pack_matrix(
        values.to(device),
        scale.to(device),
        None if zero is None else zero.to(device),
        size=size,
        kind=kind,
    )
    return matrix, exact * scale.double()[:, group]


def rows(number: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rng = torch.Generator().manual_seed(number)
    return torch.randn(number, inputs, generator=rng).to(device, dtype)


def assert_product(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = x.double().cpu() @ weight.t()
    if bias is not None:
        exact += bias.double().cpu()
    assert got.dtype is x.dtype
    assert got.shape == exact.shape
    error = (got.double().cpu() - exact).abs().max() / exact.abs().max()
    assert error <= TOLERANCE[x.dtype]


# Groups, inputs and outputs: no multiples of a tile, a chunk, or each other.
SHAPES = [
    (32, 160, 40),
    (64, 328, 7),
    (128, 300, 65),
    (16, 144, 33),
    (None, 72, 24),
    (256, 520, 70),
]


@pytest.mark.parametrize(("size", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("kind", ValueKind)
def test_a_product_is_that_of_the_unpacked_weight(
    kind: ValueKind,
    size: int | None,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    matrix, weight = weight_of(kind, outputs, inputs, size, device, zeros=size != 64)
    bias = rows(1, outputs, dtype, device)[0] if size == 128 else None
    for number in (1, 2, 17):
        x = rows(number, inputs, dtype, device)
        kernel = packed_gemv if number == 1 else packed_matmul
        got = kernel(x, matrix, bias, capability=90, num_sms=4)
        assert_product(got, x, weight, bias)


@pytest.mark.parametrize("kind", ValueKind)
def test_an_unpacked_weight_is_exact(kind: ValueKind, device: torch.device) -> None:
    """Also where the GPU cannot convert small floats: subnormal ones among them."""
    matrix, weight = weight_of(kind, 70, 328, 64, device)
    for capability in (80, 90):
        got = packed_dequantize(matrix, torch.float32, capability=capability)
        assert torch.equal(got.t().double().cpu(), weight)


@pytest.mark.parametrize("number", [1, 3, 130])
def test_small_floats_are_multiplied_on_gpus_that_do_not_know_them(
    number: int, device: torch.device
) -> None:
    matrix, weight = weight_of(ValueKind.FP8, 40, 200, None, device)
    x = rows(number, 200, torch.float32, device)
    kernel = packed_gemv if number == 1 else packed_matmul
    got = kernel(x, matrix, None, capability=80, num_sms=4)
    assert_product(got, x, weight, None)


@pytest.mark.parametrize("number", [1, 16])
def test_programs_that_share_the_inputs_add_up_the_same_every_time(
    number: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_splits, "LEAST_CHUNKS", 1)
    matrix, weight = weight_of(ValueKind.INT4, 70, 1100, 32, device)
    assert matrix.num_chunks == 5
    assert packed_splits.chunks_of_split(matrix, 2, num_sms=6) == 2
    x = rows(number, 1100, torch.float32, device)
    kernel = packed_gemv if number == 1 else packed_matmul
    # The second product finds the counters as the first one left them.
    first, second = (kernel(x, matrix, None, capability=90, num_sms=6) for _ in range(2))
    assert torch.equal(first, second)
    assert_product(first, x, weight, None)
    assert not matrix.arrived.any()


def test_the_kernel_is_chosen_by_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for name in ("packed_gemv", "packed_matmul", "packed_dequantize"):
        kernel = getattr(chooser, name)
        monkeypatch.setattr(
            chooser, name, lambda *a, _k=kernel, _n=name, **k: used.append(_n) or _k(*a, **k)
        )
    monkeypatch.setattr(chooser, "MOST_PACKED_ROWS", 5)
    matrix, weight = weight_of(ValueKind.INT4, 24, 160, 32, device)
    bias = rows(1, 24, torch.float32, device)[0]
    for number in (0, 1, 2, 5, 6):
        x = rows(number, 160, torch.float32, device)
        for one in (None, bias):
            got = chooser.packed_linear(x, matrix, one)
            assert got.shape == (number, 24)
            if number:
                assert_product(got, x, weight, one)
    assert used[::2] == [
        "packed_matmul",
        "packed_gemv",
        *["packed_matmul"] * 2,
        "packed_dequantize",
    ]


def test_rows_may_be_a_part_of_wider_ones(device: torch.device) -> None:
    matrix, weight = weight_of(ValueKind.INT4, 24, 160, 32, device)
    x = rows(3, 200, torch.float32, device)[:, :160]
    got = packed_matmul(x, matrix, None, capability=90, num_sms=4)
    assert_product(got, x, weight, None)


def test_four_bits_take_a_quarter_of_sixteen(device: torch.device) -> None:
    matrix, weight = weight_of(ValueKind.INT4, 256, 1024, 128, device)
    assert matrix.num_bytes < 0.27 * 2 * weight.numel()


@pytest.mark.parametrize(
    ("size", "kind", "kept"),
    [
        (128, ValueKind.INT4, (128, 32)),
        (32, ValueKind.INT4, (32, 32)),
        (512, ValueKind.INT4, (512, 32)),
        (48, ValueKind.INT4, (16, 16)),
        (40, ValueKind.INT4, None),
        (128, ValueKind.FP8, (128, 32)),
        (24, ValueKind.FP8, None),
    ],
)
def test_odd_groups_are_kept_as_smaller_ones(
    size: int, kind: ValueKind, kept: tuple[int, int] | None
) -> None:
    assert packed_group(size, kind) == kept
