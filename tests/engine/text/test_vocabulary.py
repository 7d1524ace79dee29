"""Two vocabularies are alike where no id means another token in one than in the other."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from minserve.engine.text.tokenizer import Tokenizer
from minserve.engine.text.vocabulary import are_alike
from minserve.models.finding.source import find_model
from parts.tokenizers_parity import vocabularies as made

IDS = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (IDS, True),
        (IDS | {"[PAD3]": 3, "[PAD7]": 4}, True),
        ({"[PAD0]": 0, "b": 1, "[EMPTY_2]": 2}, True),
        (IDS | {"<pad>": 3}, True),
        (IDS | {"c": 3}, False),
        (IDS | {"c": 3, "[PAD2]": 2}, False),  # 2 is open there, but "c" has another id
        ({"a": 0, "b": 1, "d": 2}, False),
        ({"a": 1, "b": 0, "c": 2}, False),
        ({"a": 0, "b": 1, "[PAD]": 2}, False),
    ],
)
def test_vocabularies_that_are_alike(other, expected):
    assert are_alike(IDS, other) is expected
    assert are_alike(other, IDS) is expected


def padded_gguf(path: Path, tokens: list[str], merges: list[list[str]], padding: int) -> Path:
    """A file whose vocabulary is as large as a model's embedding, as llama.cpp's converter does."""
    size = len(tokens) + padding
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(len(tokens), size))])
    types = [made.CONTROL if token in made.SPECIAL else made.NORMAL for token in tokens]
    writer.add_token_types([*types, *[gguf.TokenType.UNUSED] * padding])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("padding", [0, 200])
def test_a_padded_gguf_file_has_the_vocabulary_of_its_folder(tmp_path, padding):
    bpe = made.byte_level_bpe("qwen2")
    settings = {"tokenizer_class": "Qwen2Tokenizer"}
    folder = Tokenizer.load(find_model(str(made.json_folder(tmp_path / "m", bpe, settings))))
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    file = padded_gguf(tmp_path / "m.gguf", tokens, model["merges"], padding)
    in_gguf = Tokenizer.load(find_model(str(file)))
    assert folder.has_vocabulary_of(in_gguf)
    assert in_gguf.has_vocabulary_of(folder)
    tokens[2000], tokens[2001] = tokens[2001], tokens[2000]
    other = padded_gguf(tmp_path / "o.gguf", tokens, model["merges"], padding)
    assert not folder.has_vocabulary_of(Tokenizer.load(find_model(str(other))))
