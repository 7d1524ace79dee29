"""The tensors of GGUF files of every family are those of transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGML
from gguf_models import CLASSES, NORM, Q_PROJ, tiny_model, weights_of

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.gguf_files.gguf_checkpoint import GGUFCheckpoint
from shared.reference_models.gguf_writer import write_gguf

ALL_BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in CLASSES),
        ("llama", {**ALL_BIASES, "head_dim": 10, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 6}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 24}),
        ("granite", {**ALL_BIASES, "num_key_value_heads": 1}),
        ("smollm3", {"attention_bias": True, "tie_word_embeddings": False}),
        ("gemma", {"attention_bias": True, "head_dim": 32}),
    ],
    ids=str,
)
def test_tensors_are_those_of_transformers(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    model = tiny_model(family, **settings)
    expected = weights_of(model)
    with GGUFCheckpoint(write_gguf(model, tmp_path / "m.gguf")) as checkpoint:
        assert checkpoint.names() == set(expected)
        for name, tensor in expected.items():
            # Gemma's norms are stored plus one, which rounds them.
            rounded = 1e-7 if family == "gemma" and "norm" in name else 0.0
            difference = checkpoint.get(name, tuple(tensor.shape)) - tensor
            assert difference.abs().max() <= rounded, name
        assert checkpoint.num_parameters() == sum(t.numel() for t in expected.values())


@pytest.mark.parametrize(("kind", "tolerance"), [(GGML.F16, 1e-3), (GGML.Q8_0, 1e-2)])
def test_quantized_rows_come_in_their_right_order(
    tmp_path: Path, kind: GGML, tolerance: float
) -> None:
    model = tiny_model()
    file = write_gguf(model, tmp_path / "m.gguf", weights=kind)
    with GGUFCheckpoint(file) as checkpoint:
        for name, tensor in weights_of(model).items():
            error = (checkpoint.get(name, tuple(tensor.shape)) - tensor).abs().max()
            assert error <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.1.ffn_gate_inp.weight"),
        ("llama", "blk.0.attn_qkv.weight"),
        ("llama", "blk.0.attn_q.scale"),
        ("llama", "output_norm.bias"),
        ("qwen2", "blk.0.attn_output.bias"),
        ("phi3", "blk.0.attn_q.weight"),
        ("gemma", "blk.0.post_ffw_norm.weight"),
    ],
)
def test_a_tensor_that_the_model_would_leave_out_is_refused(
    tmp_path: Path, family: str, tensor: str
) -> None:
    extra = {tensor: np.ones(96, np.float32)}
    file = write_gguf(tiny_model(family), tmp_path / "odd.gguf", tensors=extra)
    with pytest.raises(UnsupportedModelError, match=rf"odd\.gguf: tensor '{tensor}'.*{family}"):
        GGUFCheckpoint(file)


def test_frequencies_of_old_files_are_no_weights(tmp_path: Path) -> None:
    model = tiny_model()
    extra = {"blk.0.attn_rot_embd.weight": np.ones(8, np.float32)}
    with GGUFCheckpoint(write_gguf(model, tmp_path / "m.gguf", tensors=extra)) as checkpoint:
        assert checkpoint.names() == set(weights_of(model))


def test_shapes_are_checked_also_where_rows_cannot_be_put_back(tmp_path: Path) -> None:
    model = tiny_model()
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight = torch.nn.Parameter(torch.ones(18, 96))
    model.config.model_type = "qwen2"  # written unpermuted
    file = write_gguf(model, tmp_path / "m.gguf")
    model.config.model_type = "llama"
    file.write_bytes(file.read_bytes().replace(b"qwen2", b"llama"))
    with (
        GGUFCheckpoint(file) as checkpoint,
        pytest.raises(ModelLoadError, match=rf"m\.gguf.*{Q_PROJ}.*\(18, 96\).*\(96, 96\)"),
    ):
        checkpoint.get(Q_PROJ, (96, 96))


def test_each_part_of_a_split_model_is_read_and_named(tmp_path: Path) -> None:
    model = tiny_model()
    expected = weights_of(model)
    write_gguf(model, tmp_path / "m.gguf", max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for part in parts:  # whichever part is named
        with GGUFCheckpoint(part) as checkpoint:
            assert checkpoint.names() == set(expected)
            assert {checkpoint.describe(name) for name in expected} == {str(p) for p in parts}
            for name, tensor in expected.items():
                assert torch.equal(checkpoint.get(name, tuple(tensor.shape)), tensor), name


def test_integers_are_no_weights(tmp_path: Path) -> None:
    model = tiny_model()
    file = write_gguf(model, tmp_path / "m.gguf")
    data = file.read_bytes()
    entry = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    # The entry's type: 26 is I32, of the same size as F32.
    file.write_bytes(data[:entry] + (26).to_bytes(4, "little") + data[entry + 4 :])
    with (
        GGUFCheckpoint(file) as checkpoint,
        pytest.raises(ModelLoadError, match=r"m\.gguf: tensor 'output_norm\.weight'.*I32"),
    ):
        checkpoint.get(NORM, (96,))
