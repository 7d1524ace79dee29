"""The gates of SwiGLU and GeGLU MLPs at the widths of Llama and Gemma."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as

from minserve.kernels.triton.gate import gelu_tanh_mul, silu_mul
from minserve.models.layers import gelu_tanh_mul as plain_gelu_tanh_mul
from minserve.models.layers import silu_mul as plain_silu_mul

# Tokens by width: odd, SmolLM2's, Llama-2-7B's, those of Llama-3-8B and 70B.
SHAPES = [(123, 101), (5, 1536), (5, 11008), (1, 14336), (1, 28672), (0, 14336)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul_is_as_exact_as_torch(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    tokens, size = shape
    gate_up = (torch.randn(tokens, 2 * size) * 4).to(device, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    untouched = gate_up.clone()
    got = silu_mul(gate_up)
    assert torch.equal(gate_up, untouched)
    assert_as_exact_as(plain_silu_mul(gate_up), got, F.silu(gate) * up)


@pytest.mark.parametrize("shape", [(123, 101), (5, 16384)], ids=str)
def test_gelu_tanh_mul_is_as_exact_as_torch(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    tokens, size = shape
    gate_up = (torch.randn(tokens, 2 * size) * 4).to(device, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = F.gelu(gate, approximate="tanh") * up
    assert_as_exact_as(plain_gelu_tanh_mul(gate_up), gelu_tanh_mul(gate_up), exact)


# NumPy, under the interpreter, says that exp overflowed: it may, 1 / inf is the right zero.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_far_from_zero_neither_overflow_nor_vanish(device: torch.device) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    assert silu_mul(gate_up).tolist() == [[0.0, 0.0, 0.0, 400.0]]
    assert gelu_tanh_mul(gate_up).tolist() == [[0.0, 0.0, 0.0, 400.0]]
