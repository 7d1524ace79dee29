"""Names that other programs take are known, and say what to give here."""

from __future__ import annotations

from pathlib import Path

import pytest

from minserve.errors import ModelLoadError
from minserve.models.finding.foreign_names import foreign_name
from minserve.models.finding.source import find_model

HUB = "for the hub write Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", HUB),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/", HUB),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", HUB),
        ("huggingface.co/Qwen/Qwen3-0.6B", HUB),
        ("hf.co/Qwen/Qwen3-0.6B:Q8_0", HUB),
        ("Qwen/X-GGUF:Q8_0", "hf download Qwen/X-GGUF' and the file's name, and give the .gguf"),
        ("qwen3:0.6b", "give the path of Ollama's folder"),
    ],
)
def test_a_name_of_another_program_says_what_is_meant(name: str, says: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        find_model(name)
    assert str(caught.value).startswith(f"no model at {name!r}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "./no/such/folder", "model.gguf", "smollm3"])
def test_names_that_may_be_meant_as_they_are_have_no_such_words(name: str) -> None:
    assert foreign_name(name) is None


def test_a_file_that_is_there_counts_whatever_its_name(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "qwen3:0.6b").symlink_to(tiny_llama_dir)
    assert find_model(str(tmp_path / "qwen3:0.6b")).config_dir.samefile(tiny_llama_dir)
