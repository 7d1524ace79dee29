"""Models of fused layers give the logits of plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.paged_model import PagedModel
from minserve.kernels.attention import make_attention_backend
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import DenseReluLinear, WeightFormat, WeightPlacement
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint
from shared.reference_models.reference import reference_model, save
from shared.reference_models.variants import CASES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16
VARIANTS = (
    "llama, odd widths",
    "qwen3",
    "phi3, part of each head rotated",
    "granite",
    "smollm3",
    "gemma",
    "opt, as 350m",
    "opt, plain layer norms",
    "opt, no biases",
    "opt, GELU",
)


def placement(fused: bool) -> WeightPlacement:
    """float32 with plain weights, as on a GPU."""
    return WeightPlacement(DEVICE, torch.float32, torch.float32, WeightFormat.DENSE, fused)


@torch.inference_mode()
def logits(folder: Path, fused: bool) -> torch.Tensor:
    """Of a prompt, then of two tokens more that read its KV. Fused: attention in Triton too."""
    source, where = find_model(str(folder)), placement(fused)
    with open_checkpoint(source) as checkpoint:
        model = build_model(checkpoint, load_config(source), where)
    s = model.shape
    attention = "triton" if fused and s.head_dim % 8 == 0 else "torch"
    backend = make_attention_backend(attention, s.num_heads, s.num_kv_heads, s.head_dim, s.scale)
    kv = [backend.allocate(2, BLOCK_SIZE, where.dtype, DEVICE) for _ in range(s.num_layers)]
    paged = PagedModel(model, backend, kv, BLOCK_SIZE, DEVICE)
    passes = [
        paged.forward([Chunk(token_ids, start, [1, 0])], num_decodes)
        for token_ids, start, num_decodes in ((range(3, 20), 0, 0), ([7], 17, 1), ([9], 18, 1))
    ]
    return model.logits(torch.cat(passes))


def assert_agree(folder: Path) -> None:
    want, got = logits(folder, fused=False), logits(folder, fused=True)
    assert want.abs().max() > 0.1  # lively enough for a difference to show
    torch.testing.assert_close(got, want, rtol=3e-5, atol=3e-5)


def test_llama_agrees(tiny_llama_dir: Path) -> None:
    assert_agree(tiny_llama_dir)


def test_opt_agrees(tiny_opt_dir: Path) -> None:
    assert_agree(tiny_opt_dir)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_agree(variant: str, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == variant)
    assert_agree(save(reference_model(case), tmp_path, case))


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_relu_rides_in_the_matmul_and_changes_nothing(has_bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 96), torch.randn(rows, 96).to(DEVICE)
    bias = torch.randn(48) if has_bias else None
    linear = placement(fused=True).activated_linear(weight, bias, torch.relu_)
    assert isinstance(linear, DenseReluLinear) == has_bias
    want = placement(fused=False).activated_linear(weight, bias, torch.relu_)(x)
    torch.testing.assert_close(linear(x), want, rtol=1e-5, atol=1e-5)
    assert (want >= 0).all()


def test_a_packed_weight_keeps_its_form_when_fused() -> None:
    cpu = torch.device("cpu")
    packed = WeightPlacement.choose(cpu, "float32", fused=True)
    plain = WeightPlacement.choose(cpu, "float32")
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 96), torch.randn(48), torch.randn(7, 96)
    want = plain.activated_linear(weight, bias, torch.relu_)(x)
    assert packed.format is plain.format
    assert torch.equal(packed.activated_linear(weight, bias, torch.relu_)(x), want)


def test_tied_embeddings_lie_in_memory_once(tiny_opt_dir: Path) -> None:
    source = find_model(str(tiny_opt_dir))
    with open_checkpoint(source) as checkpoint:
        model = build_model(checkpoint, load_config(source), placement(fused=True))
    assert model.head.weight.data_ptr() == model.embed.table.data_ptr()
