"""The gates of SwiGLU and GeGLU MLPs at the widths of Llama and Gemma."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as

from minserve.kernels.triton.gate import gelu_tanh_mul, silu_mul
from minserve.models.layers import gelu_tanh_mul as plain_gelu_tanh_mul
from minserve.models.layers import silu_mul as plain_silu_mul

# Tokens by width: odd, SmolLM2's, Llama-2-7B's, those of Llama-3-8B, Gemma-2B and
# Llama-3-70B.
SHAPES = [
    (123, 101), (5, 1536), (5, 11008), (1, 14336), (5, 16384), (1, 28672), (0, 14336)
]  # fmt: skip


# Ours, the form in torch, and the activation in float64.
GATES = {
    "silu": (silu_mul, plain_silu_mul, F.silu),
    "gelu_tanh": (gelu_tanh_mul, plain_gelu_tanh_mul, partial(F.gelu, approximate="tanh")),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_as_exact_as_torch(
    name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    ours, plain, activation = GATES[name]
    tokens, size = shape
    gate_up = (torch.randn(tokens, 2 * size) * 4).to(device, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    untouched = gate_up.clone()
    got = ours(gate_up)
    assert torch.equal(gate_up, untouched)
    assert_as_exact_as(plain(gate_up), got, activation(gate) * up)


# NumPy, under the interpreter, says that exp overflowed: it may, 1 / inf is the right zero.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_far_from_zero_neither_overflow_nor_vanish(device: torch.device) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    assert silu_mul(gate_up).tolist() == [[0.0, 0.0, 0.0, 400.0]]
    assert gelu_tanh_mul(gate_up).tolist() == [[0.0, 0.0, 0.0, 400.0]]
