"""Where an engine takes its tokenizer from, by its settings."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from minserve.config import EngineConfig
from minserve.engine.model_tokenizer import load_model_tokenizer
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ModelLoadError
from minserve.models.finding.source import ModelSource, find_model


@pytest.fixture
def without_tokenizer(tmp_path: Path) -> ModelSource:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return find_model(str(path))


def load(source: ModelSource, tokenizer: Path | None) -> Tokenizer:
    setting = None if tokenizer is None else str(tokenizer)
    return load_model_tokenizer(EngineConfig.create(source.name, tokenizer=setting), source)


def test_a_gguf_file_without_a_tokenizer_says_what_to_give(without_tokenizer, tiny_llama_dir):
    with pytest.raises(
        ModelLoadError, match=r"holds no tokenizer; say where .* --tokenizer FOLDER"
    ):
        load(without_tokenizer, None)
    own = Tokenizer.load(find_model(str(tiny_llama_dir)))
    for place in (tiny_llama_dir, tiny_llama_dir / "tokenizer.json"):
        assert load(without_tokenizer, place).has_vocabulary_of(own)
