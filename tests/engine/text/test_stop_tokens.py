"""Tokens that end an output: by a folder's files, and by name where a GGUF file names too few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minserve.engine.text.stop_tokens import folder_stop_tokens, stop_tokens
from minserve.errors import ModelLoadError

EOS = {"eos": 1}


@pytest.mark.parametrize(
    ("tokens", "named", "expected"),
    [
        # Llama 3 Instruct, whose files often name the end of the text alone.
        (["a", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start|>"], EOS, {1, 2, 3}),
        (["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], EOS, {1, 3}),
        (["<unk>", "<s>", "</s>", "<0x00>"], {}, {2}),
        (["a", "b", "<end_of_turn>", "<eos>"], EOS, {1, 2, 3}),
        (["a", "b", "c", "d"], EOS | {"eot": 2}, {1, 2}),
        (["a", "b", "c", "d"], EOS | {"eom": 3}, {1, 3}),
        # <|end|> ends Phi's answers, but only a part of gpt-oss's.
        (["a", "<|endoftext|>", "<|end|>"], EOS, {1, 2}),
        (["a", "<|return|>", "<|end|>", "<|call|>"], EOS, {1, 3}),
        (["a", "<eos>", "</s>", "<|tool_response>"], EOS, {1, 3}),
        # Gemma's vocabulary has tags of HTML; the file may still mean one of them.
        (["a", "<eos>", "</s>", "<end_of_turn>"], EOS, {1, 3}),
        (["a", "<eos>", "</s>", "<end_of_turn>"], {"eos": 2}, {1, 2, 3}),
        (["a", "<eos>", "</s>"], EOS, {1, 2}),
        (["a", "b", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], EOS, {1, 2, 3, 4}),
        (["a", "b", "<|file_sep|>"], EOS | {"fim_sep": 0}, {0, 1}),
        (["a", "b"], {"eos": 9}, set()),
    ],
)
def test_tokens_that_end_an_output(tokens, named, expected):
    assert stop_tokens(named, {token: i for i, token in enumerate(tokens)}) == expected


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": 2}, {2}),
        ({"config": [2, 3]}, {2, 3}),
        ({"config": 2, "generation_config": [8, 9]}, {8, 9}),  # config.json's is often older
        ({"config": 2, "generation_config": None}, {2}),
        ({"config": 2, "generation_config": []}, {2}),
        ({"config": None}, set()),
        ({}, set()),
        ({"config": "stale", "generation_config": 0}, {0}),
    ],
)
def test_those_of_a_folder_are_generation_configs_or_else_configs(tmp_path, files, expected):
    assert folder_stop_tokens(write(tmp_path, **files)) == expected


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize("value", ["</s>", ["</s>"], [[1]], {"a": 1}, -5, [-1], 1.5, [None], True])
def test_what_is_no_tokens_id_is_named_with_its_file(tmp_path, name, value):
    with pytest.raises(ModelLoadError) as error:
        folder_stop_tokens(write(tmp_path, **{name: value}))
    assert str(tmp_path / f"{name}.json") in str(error.value)
    assert repr(value) in str(error.value)
