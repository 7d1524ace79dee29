"""Configurations read as transformers reads them."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.config import LlamaConfig, OPTConfig


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_defaults_are_those_of_transformers(family: str) -> None:
    import transformers

    theirs = {"llama": transformers.LlamaConfig, "opt": transformers.OPTConfig}[family]()
    ours = {"llama": LlamaConfig, "opt": OPTConfig}[family].from_dict({})
    for field in fields(ours):
        # A trimmed head is none of transformers' ideas.
        if not field.name.endswith("token_id") and field.name != "draft_vocab_size":
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_what_transformers_writes_is_read_back() -> None:
    from transformers import LlamaConfig as Theirs

    theirs = Theirs(num_key_value_heads=8, head_dim=64, rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})  # fmt: skip
    ours = LlamaConfig.from_dict(json.loads(theirs.to_json_string()))
    for field in fields(ours):
        if field.name != "draft_vocab_size":
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


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
