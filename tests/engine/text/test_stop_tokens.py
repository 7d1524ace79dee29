"""Tokens that end an output by their names, where the metadata of a GGUF file names too few."""

from __future__ import annotations

import pytest

from minserve.engine.text.stop_tokens import stop_tokens

EOS = {"tokenizer.ggml.eos_token_id": 1}


@pytest.mark.parametrize(
    ("tokens", "metadata", "expected"),
    [
        # Llama 3 Instruct, whose files often name the end of the text alone.
        (["a", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start|>"], EOS, {1, 2, 3}),
        (["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], EOS, {1, 3}),
        (["<unk>", "<s>", "</s>", "<0x00>"], {}, {2}),
        (["a", "b", "<end_of_turn>", "<eos>"], EOS, {1, 2, 3}),
        (["a", "b", "c", "d"], EOS | {"tokenizer.ggml.eot_token_id": 2}, {1, 2}),
        (["a", "b", "c", "d"], EOS | {"tokenizer.ggml.eom_token_id": 3}, {1, 3}),
        # <|end|> ends Phi's answers, but only a part of gpt-oss's.
        (["a", "<|endoftext|>", "<|end|>"], EOS, {1, 2}),
        (["a", "<|return|>", "<|end|>", "<|call|>"], EOS, {1, 3}),
        (["a", "<eos>", "</s>", "<|tool_response>"], EOS, {1, 3}),
        (["a", "b", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], EOS, {1, 2, 3, 4}),
        (["a", "b", "<|file_sep|>"], EOS | {"tokenizer.ggml.fim_sep_token_id": 0}, {0, 1}),
        (["a", "b"], {"tokenizer.ggml.eos_token_id": 9}, set()),
    ],
)
def test_tokens_that_end_an_output(tokens, metadata, expected):
    assert stop_tokens(metadata, {token: i for i, token in enumerate(tokens)}) == expected
