"""Configurations read as transformers reads them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.config import CONFIGS, LlamaConfig, OPTConfig

THEIRS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "phi3": "Phi3Config",
    "granite": "GraniteConfig",
    "smollm3": "SmolLM3Config",
    "gemma": "GemmaConfig",
    "opt": "OPTConfig",
}


def their_config(family: str, **values: Any) -> Any:
    import transformers

    return getattr(transformers, THEIRS[family])(**values)


def assert_equal_where_both_have_it(ours: Any, theirs: Any) -> None:
    compared = 0
    for name in (field.name for field in fields(ours)):
        if hasattr(theirs, name) and not name.endswith("token_id"):
            want, got = getattr(theirs, name), getattr(ours, name)
            if name == "rope_parameters":  # a part of 1 says nothing
                want, got = ({"partial_rotary_factor": 1.0, **one} for one in (want, got))
            assert got == want or not want, name
            compared += 1
    assert compared >= 9


def test_every_family_is_compared() -> None:
    assert set(THEIRS) == set(CONFIGS)


@pytest.mark.parametrize("family", THEIRS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    ours = CONFIGS[family].from_dict({"model_type": family})
    assert_equal_where_both_have_it(ours, their_config(family))


@pytest.mark.parametrize("family", THEIRS)
def test_what_transformers_writes_is_read_back(family: str) -> None:
    sizes = {"hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 6}
    kind = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    if family == "phi3":
        kind = {"rope_type": "longrope", "rope_theta": 5e5, "factor": 4.0,
                "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
    if family != "opt":
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": kind}
    theirs = their_config(family, **sizes)
    ours = CONFIGS[family].from_dict(json.loads(theirs.to_json_string()))
    assert_equal_where_both_have_it(ours, theirs)


@pytest.mark.parametrize(
    ("family", "values", "window"),
    [
        ("llama", {"sliding_window": 7}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 7}, 7),
        ("phi3", {}, None),
        ("phi3", {"sliding_window": 2047}, 2047),
        ("qwen2", {"sliding_window": 7}, None),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, 7),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 32}, None),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 99}, 7),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 32}, None),
    ],
)
def test_windows_cap_the_length(family: str, values: dict, window: int | None) -> None:
    config = LlamaConfig.from_dict({"model_type": family, **values})
    assert config.sliding_window == window
    assert config.max_positions == min(window or 10**9, config.max_position_embeddings)


@pytest.mark.parametrize(
    ("rope", "usual", "most"),
    [
        ({"rope_type": "default"}, 1000, 1000),
        ({"rope_type": "linear", "factor": 4.0}, 4000, 4000),
        ({"rope_type": "dynamic", "factor": 4.0}, 1000, 4000),
        ({"rope_type": "yarn", "factor": 4.0}, 4000, 4000),
        ({"rope_type": "yarn", "original_max_position_embeddings": 250}, 1000, 1000),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            1000,
            1000,
        ),
    ],
)
def test_scaling_says_how_long_sequences_may_be(rope: dict, usual: int, most: int) -> None:
    config = LlamaConfig.from_dict({"max_position_embeddings": 1000, "rope_parameters": rope})
    assert (config.max_positions, config.most_positions) == (usual, most)


@pytest.mark.parametrize(
    "entry",
    [
        {"no_rope_layers": [0] * 32},
        {"no_rope_layer_interval": 2},
        {"logits_scaling": 8.0},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.22},
        {"attention_multiplier": 0.01},
        {"norm_offset": 1.0},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_entries_of_another_family_mean_nothing_to_a_llama(entry: dict) -> None:
    assert LlamaConfig.from_dict(entry) == LlamaConfig.from_dict({})


def test_what_is_null_follows_from_the_other_sizes() -> None:
    null = {"num_key_value_heads": None, "head_dim": None, "hidden_size": 1024}
    config = LlamaConfig.from_dict({"model_type": "qwen3", "num_attention_heads": 16, **null})
    assert (config.num_key_value_heads, config.head_dim) == (16, 64)


def test_gemmas_first_files_mean_gelu_by_tanh() -> None:
    config = LlamaConfig.from_dict({"model_type": "gemma", "hidden_act": "gelu"})
    assert config.hidden_act == "gelu_pytorch_tanh"


def test_layers_without_rope_follow_the_interval_or_the_list() -> None:
    values = {"model_type": "smollm3", "num_hidden_layers": 5}
    assert LlamaConfig.from_dict(values).no_rope_layers == [1, 1, 1, 0, 1]
    listed = LlamaConfig.from_dict({**values, "no_rope_layers": [0, 1, 1, 1, 1]})
    assert listed.no_rope_layers == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("values", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1000, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        ),
    ],
    ids=["none", "theta", "older scaling"],
)
def test_older_rope_settings_are_understood(values: dict, rope: dict) -> None:
    assert LlamaConfig.from_dict(values).rope_parameters == rope


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"hidden_size": "big"}, ModelLoadError, "hidden_size has the value 'big'"),
        ({"num_hidden_layers": True}, ModelLoadError, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, ModelLoadError, "at least 1"),
        ({"num_key_value_heads": 5}, ModelLoadError, "no multiple"),
        ({"head_dim": 7}, ModelLoadError, "odd"),
        ({"rope_scaling": [1]}, ModelLoadError, "must be an object"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "'gelu' is not supported"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            UnsupportedModelError,
            "partial rotary",
        ),
        ({"rope_scaling": {"type": "spiral"}}, UnsupportedModelError, "'spiral' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, ModelLoadError, "needs 'factor', which is missing"),
        ({"rope_scaling": {"type": "dynamic"}}, ModelLoadError, "needs 'factor'"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            ModelLoadError,
            "factor has the value",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            ModelLoadError,
            "needs 'low_freq_factor'",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            ModelLoadError,
            "short_factor has 1 entries and needs 64",
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": 1.0}},
            ModelLoadError,
            "a list of numbers",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ModelLoadError, "1 entries for 36"),
        ({"model_type": "mistral", "sliding_window": 0}, ModelLoadError, "sliding_window"),
        ({"model_type": "granite", "logits_scaling": 0}, ModelLoadError, "logits_scaling"),
        ({"model_type": "granite", "attention_multiplier": 0}, ModelLoadError, "attention_mul"),
        ({"model_type": "smollm3", "no_rope_layers": ["x"]}, ModelLoadError, "no_rope_layers has"),
        ({"num_hidden_layers": 10**9}, ModelLoadError, "at most 1000"),
        ({"vocab_size": 10**30}, ModelLoadError, "vocab_size must be"),
        ({"num_key_value_heads": -3}, ModelLoadError, "num_key_value_heads must be"),
        ({"head_dim": 10**12}, ModelLoadError, "head_dim must be"),
        ({"draft_vocab_size": -1}, ModelLoadError, "draft_vocab_size"),
        ({"rms_norm_eps": -1.0}, ModelLoadError, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, ModelLoadError, "rms_norm_eps"),
        ({"eos_token_id": ["</s>"]}, ModelLoadError, "eos_token_id has the value"),
        ({"eos_token_id": [[1]]}, ModelLoadError, "eos_token_id has the value"),
        ({"eos_token_id": -1}, ModelLoadError, "no token's id"),
        ({"is_causal": False}, UnsupportedModelError, "is_causal is false"),
        ({"rope_scaling": {"type": ["yarn"]}}, ModelLoadError, "not a name"),
        ({"rope_scaling": {**YARN, "attention_factor": "x"}}, ModelLoadError, "attention_factor"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, ModelLoadError, "attention_factor"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, ModelLoadError, "beta_fast"),
        ({"rope_scaling": YARN, "rope_theta": 1}, ModelLoadError, "rope_theta must be above 1"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            UnsupportedModelError,
            "differ between layers",
        ),
    ],
)
def test_llama_values_without_sense_are_named(values: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LlamaConfig.from_dict(values)


def test_opt_values_without_sense_are_named() -> None:
    with pytest.raises(ModelLoadError, match="does not divide"):
        OPTConfig.from_dict({"num_attention_heads": 7})
    with pytest.raises(UnsupportedModelError, match="'tanh' is not supported"):
        OPTConfig.from_dict({"activation_function": "tanh"})
