"""RoPE settings of GGUF files give the frequencies of the model that was converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import tiny_model

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.gguf_files.gguf_model import GGUFModel
from minserve.models.gguf_files.gguf_rope import gguf_rope
from shared.reference_models.gguf_writer import write_gguf

SCALING = "llama.rope.scaling"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.05, 1.1, 1.3, 1.45, 1.6],
    "long_factor": [1.0, 1.2, 2.7, 8.3, 21.1, 40.0],
    "partial_rotary_factor": 0.75,
}


def rope_of(path: Path, head_dim: int = 16) -> dict[str, Any]:
    return gguf_rope(GGUFModel(path), head_dim)


def assert_same_rotation(config: Any, rope: dict[str, Any], seq_len: int) -> None:
    """Compare frequencies and the factor on rotated vectors, as transformers computes both."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    again = type(config)(**{**config.to_dict(), "rope_parameters": dict(rope)})
    compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    want, want_factor = compute(config, "cpu", seq_len)
    got, got_factor = compute(again, "cpu", seq_len)
    assert torch.allclose(want, got, rtol=1e-6, atol=0)
    assert got_factor == pytest.approx(want_factor, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.5}),
        ("llama", LLAMA3),
        ("llama", {**LLAMA3, "factor": 8.0}),
        ("granite", LLAMA3),
        ("qwen2", YARN),
        ("qwen2", {**YARN, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}),
        ("qwen3", YARN),
    ],
    ids=str,
)
def test_scalings_come_back_as_they_were(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    settings = {"head_dim": 16} if family == "qwen3" else {}
    model = tiny_model(family, rope_parameters=dict(rope), **settings)
    found = rope_of(write_gguf(model, tmp_path / "m.gguf"))
    assert found == rope
    assert_same_rotation(model.config, found, 200)


@pytest.mark.parametrize("seq_len", [50, 200])
def test_longrope_with_a_part_of_each_head_comes_back(tmp_path: Path, seq_len: int) -> None:
    model = tiny_model("phi3", rope_parameters=dict(LONG), original_max_position_embeddings=64)
    found = rope_of(write_gguf(model, tmp_path / "m.gguf"))
    assert found.pop("attention_factor") == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)
    assert found == {**LONG, "original_max_position_embeddings": 64}
    assert_same_rotation(model.config, found, seq_len)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({f"{SCALING}.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({f"{SCALING}.factor": 0.0}, {"rope_type": "default"}),
        ({"llama.rope.scale_linear": 1.0}, {"rope_type": "default"}),
        (
            {"llama.rope.scale_linear": 4.0, f"{SCALING}.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({f"{SCALING}.type": "none", f"{SCALING}.factor": 4.0}, {"rope_type": "default"}),
        (
            {f"{SCALING}.type": "linear", "llama.rope.scale_linear": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
    ],
    ids=str,
)
def test_a_factor_means_what_llama_cpp_takes_it_for(
    tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]
) -> None:
    file = write_gguf(tiny_model(), tmp_path / "m.gguf", metadata=metadata)
    assert rope_of(file) == {**expected, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({}, None),  # transformers computes 0.1 ln 4 + 1 itself
        ({"attn_factor": 0.5}, 0.5 * (0.1 * np.log(4) + 1)),
        ({"yarn_attn_factor": 1.25}, 1.25),
        ({"yarn_ext_factor": 1.0}, None),
    ],
    ids=str,
)
def test_yarn_has_the_factor_on_rotated_vectors_that_the_file_means(
    tmp_path: Path, extra: dict[str, float], factor: float | None
) -> None:
    metadata = {f"{SCALING}.{name}": value for name, value in extra.items()}
    model = tiny_model(rope_parameters=dict(YARN))
    found = rope_of(write_gguf(model, tmp_path / "m.gguf", metadata=metadata))
    assert found.get("attention_factor") == (factor and pytest.approx(factor))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({f"{SCALING}.type": "linear"}, rf"'{SCALING}\.factor'"),
        ({f"{SCALING}.type": "yarn"}, rf"'{SCALING}\.factor'"),
        (
            {f"{SCALING}.type": "yarn", f"{SCALING}.factor": 4.0},
            rf"'{SCALING}\.original_context_length'",
        ),
        ({f"{SCALING}.type": "longrope"}, r"rope_factors_long\.weight"),
        ({f"{SCALING}.type": 3}, rf"'{SCALING}\.type'"),
        ({f"{SCALING}.factor": "four"}, rf"'{SCALING}\.factor'"),
    ],
)
def test_a_scaling_without_its_settings_names_the_key(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    file = write_gguf(tiny_model(), tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ModelLoadError, match=rf"m\.gguf.*{message}"):
        rope_of(file)


@pytest.mark.parametrize(
    ("family", "metadata", "tensors", "message"),
    [
        ("llama", {f"{SCALING}.type": "dynamic"}, (), "'dynamic' is not supported.*yarn"),
        ("llama", {}, ("rope_freqs",), r"rope_freqs\.weight holds RoPE factors.*not Llama 3's"),
        ("llama", {f"{SCALING}.factor": 2.0}, ("rope_freqs",), "'linear' together with tensors"),
        ("llama", {f"{SCALING}.type": "linear", f"{SCALING}.factor": 2.0}, ("rope_factors_long",), "'linear' together"),
        (
            "llama",
            {f"{SCALING}.type": "yarn", f"{SCALING}.factor": 2.0, f"{SCALING}.yarn_ext_factor": 0.5,
             f"{SCALING}.original_context_length": 64},
            (),
            "yarn_ext_factor 0.5",
        ),
        ("llama", {f"{SCALING}.attn_factor": 0.5}, (), "attn_factor is supported with yarn"),
        (
            "llama",
            {f"{SCALING}.attn_factor": 0.5, f"{SCALING}.factor": 2.0},
            (),
            "attn_factor is supported with yarn",
        ),
        ("qwen2", {"qwen2.rope.dimension_count": 8}, (), r"rope\.dimension_count 8"),
        ("granite", {"granite.rope.scaling.finetuned": False}, (), "without RoPE"),
    ],
)  # fmt: skip
def test_rope_that_cannot_be_reproduced_is_refused(
    tmp_path: Path, family: str, metadata: dict[str, Any], tensors: tuple[str, ...], message: str
) -> None:
    factors = {f"{name}.weight": np.linspace(1, 9, 8, dtype=np.float32) for name in tensors}
    file = write_gguf(tiny_model(family), tmp_path / "m.gguf", metadata=metadata, tensors=factors)
    with pytest.raises(UnsupportedModelError, match=rf"m\.gguf.*{message}"):
        rope_of(file)


def test_half_of_longrope_names_the_other_half(tmp_path: Path) -> None:
    half = {"rope_factors_short.weight": np.ones(8, np.float32)}
    file = write_gguf(tiny_model("phi3"), tmp_path / "m.gguf", tensors=half)
    with pytest.raises(ModelLoadError, match=r"m\.gguf.*rope_factors_long\.weight.*missing"):
        rope_of(file)
