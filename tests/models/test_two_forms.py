"""Weights in two forms: which passes take which, and that both are the same linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minserve import Engine
from minserve.engine import build
from minserve.engine.profile.profile_cache import profile_key
from minserve.models.layers import FEW_ROWS, WeightFormat, WeightPlacement

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU does not multiply bfloat16 in hardware, so it keeps one form",
)


def placement() -> WeightPlacement:
    return WeightPlacement(CPU, torch.bfloat16, torch.bfloat16, WeightFormat.ONEDNN_AND_FP16)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In float64, of the weight as it is kept."""
    out = x.double() @ weight.bfloat16().double().T
    return out if bias is None else out + bias.bfloat16().double()


def test_passes_over_few_tokens_have_float32_activations() -> None:
    two = placement()
    assert [two.pass_dtype(n) for n in (1, FEW_ROWS)] == [torch.float32] * 2
    assert two.pass_dtype(FEW_ROWS + 1) is torch.bfloat16
    one = WeightPlacement(CPU, torch.bfloat16, torch.bfloat16, WeightFormat.ONEDNN)
    assert one.pass_dtype(1) is torch.bfloat16


@needs_bf16
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_both_forms_are_the_same_linear(rows: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    two = placement()
    weight, bias = torch.randn(48, 96), torch.randn(48) if with_bias else None
    x = torch.randn(rows, 96).to(two.pass_dtype(rows))
    got, want = two.linear(weight, bias)(x), exact(x, weight, bias)
    assert got.dtype is x.dtype
    assert (got - want).abs().max() <= want.abs().max() * (2e-6 if rows <= FEW_ROWS else 2**-8)
    relu = two.activated_linear(weight, bias, torch.relu_)(x)
    assert torch.equal(relu, got.clamp(min=0))


@needs_bf16
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu_is_the_activation_of_gate_times_up(activation: str, rows: int) -> None:
    torch.manual_seed(0)
    two = placement()
    gate, up = torch.randn(2, 48, 96)
    x = torch.randn(rows, 96).to(two.pass_dtype(rows))
    gated = exact(x, gate, None)
    gated = F.silu(gated) if activation == "silu" else F.gelu(gated, approximate="tanh")
    want = gated * exact(x, up, None)
    got = two.glu(gate, up, None, activation)(x)
    assert (got - want).abs().max() <= want.abs().max() * (2e-6 if rows == 1 else 2**-6)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 40])
def test_weights_beyond_float16_stay_right(rows: int) -> None:
    two = placement()
    weight = torch.full((4, 8), 1e6)
    x = torch.ones(rows, 8).to(two.pass_dtype(rows))
    for linear in (two.linear(weight), two.activated_linear(weight, None, torch.relu_)):
        got = linear(x)
        assert got.dtype is x.dtype
        assert (got / 8e6 - 1).abs().max() < 0.01


def test_two_forms_are_kept_where_the_second_is_small_beside_free_memory() -> None:
    free = build.Machine.look().free_memory
    assert build.has_room_twice(1000)
    assert build.has_room_twice(int(0.04 * free))
    assert not build.has_room_twice(int(0.06 * free))


@needs_bf16
def test_profiles_of_one_and_two_forms_are_kept_apart(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = []
    for twice in (True, False):
        monkeypatch.setattr(build, "has_room_twice", lambda _, twice=twice: twice)
        core = Engine(str(tiny_llama_dir), dtype="bfloat16")._core
        words.append(profile_key(core, "tiny").dtype)
    assert words == ["bfloat16 and float16", "bfloat16"]
