"""A GGUF file's metadata gives the config.json of transformers' model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_models import CLASSES, tiny_model

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.source import find_model, load_config
from minserve.models.gguf_files.gguf_config import gguf_config
from minserve.models.gguf_files.gguf_model import GGUFModel
from shared.reference_models.gguf_writer import write_gguf

# Entries that the config classes of some families do not have, and what these models then do.
IMPLIED = {
    "head_dim": 16,
    "attention_bias": False,
    "mlp_bias": False,
}
FACTORS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 13.0,
}


def config_of(path: Path) -> dict[str, Any]:
    return gguf_config(GGUFModel(path))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in CLASSES),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
        ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
        ("llama", {"eos_token_id": [2, 7], "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 32, "rope_parameters": {"rope_theta": 1e6}}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 24}),
        ("phi3", {"sliding_window": 47, "tie_word_embeddings": True}),
        ("phi3", {"original_max_position_embeddings": 256}),
        ("granite", FACTORS),
        ("smollm3", {"num_hidden_layers": 9}),
        ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_entries_are_those_of_transformers(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    model = tiny_model(family, **settings)
    expected = model.config.to_dict()
    found = config_of(write_gguf(model, tmp_path / "m.gguf"))
    assert found.pop("eos_token_id") in (expected["eos_token_id"], [expected["eos_token_id"]])
    turned = found["rope_parameters"].get("partial_rotary_factor", 1.0)
    assert turned == expected["rope_parameters"].pop("partial_rotary_factor", 1.0)
    for name, value in found.items():
        if name in expected or family != "qwen2" or name != "attention_bias":
            assert value == expected.get(name, IMPLIED.get(name)), name
    if family == "qwen2":  # transformers' class always has these biases
        assert found["attention_bias"] is True
    assert set(FACTORS) <= set(found) or family != "granite"
    assert ("sliding_window" in found) is (family in ("mistral", "phi3"))


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    model = tiny_model("mistral", sliding_window=None)
    found = config_of(write_gguf(model, tmp_path / "m.gguf"))
    assert found["model_type"] == "llama"
    assert "sliding_window" not in found


def test_granite_factors_that_are_left_out_do_nothing(tmp_path: Path) -> None:
    model = tiny_model("granite")
    file = write_gguf(model, tmp_path / "m.gguf")
    for key in (b"embedding_scale", b"residual_scale", b"attention.scale"):
        file.write_bytes(file.read_bytes().replace(key, key[::-1]))
    found = config_of(file)
    assert found["embedding_multiplier"] == found["residual_multiplier"] == 1.0
    assert found["attention_multiplier"] == 16**-0.5


@pytest.mark.parametrize("family", CLASSES)
def test_a_file_and_a_folder_of_one_model_have_one_config(tmp_path: Path, family: str) -> None:
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = tiny_model(family, **({"rope_parameters": half} if family == "phi3" else {}))
    model.save_pretrained(tmp_path / "folder")
    folder = load_config(find_model(str(tmp_path / "folder")))
    file = load_config(find_model(str(write_gguf(model, tmp_path / "m.gguf"))))
    assert file.eos_token_id == [folder.eos_token_id]
    assert replace(file, eos_token_id=folder.eos_token_id) == folder


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma9"}, "'gemma9' is not supported; minserve runs llama, .*gem"),
        ({"general.architecture": "granitemoe"}, "'granitemoe'"),
        ({"llama.expert_count": 8}, "'llama' with 8 experts"),
        ({"llama.attention.value_length": 8}, r"attention\.value_length 8"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count 8"),
    ],
)  # fmt: skip
def test_variants_that_do_not_run_say_so(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    file = write_gguf(tiny_model(), tmp_path / "odd.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=rf"odd\.gguf.*{message}"):
        config_of(file)


def test_a_window_with_biases_is_refused(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True)
    window = {"llama.attention.sliding_window": 32}
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf.*window together with biases"):
        config_of(write_gguf(model, tmp_path / "m.gguf", metadata=window))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "general.architecture", 3),
        ("llama", "llama.block_count", "many"),
        ("llama", "llama.block_count", True),
        ("llama", "llama.embedding_length", 0.5),
        ("llama", "llama.rope.freq_base", "big"),
        ("llama", "llama.attention.head_count", 0),
        ("granite", "granite.attention.head_count", 500),
        ("phi3", "phi3.attention.sliding_window", "wide"),
        ("granite", "granite.logit_scale", "large"),
        ("smollm3", "smollm3.block_count", 2**32 - 1),
        ("llama", "tokenizer.ggml.eos_token_id", "</s>"),
        ("llama", "tokenizer.ggml.eot_token_id", 1.5),
        ("llama", "tokenizer.ggml.bos_token_id", True),
    ],
)
def test_values_that_make_no_sense_are_named(
    tmp_path: Path, family: str, key: str, value: Any
) -> None:
    file = write_gguf(tiny_model(family), tmp_path / "bad.gguf", metadata={key: value})
    with pytest.raises(ModelLoadError, match=r"bad\.gguf") as error:
        config_of(file)
    assert key in str(error.value) or isinstance(value, int)


def test_a_value_that_is_missing_is_named(tmp_path: Path) -> None:
    file = write_gguf(tiny_model(), tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama.block_count", b"llama.block_cuont"))
    with pytest.raises(ModelLoadError, match=r"m\.gguf.*llama\.block_count"):
        config_of(file)
