"""Models that Ollama has downloaded, by its folders, its manifests and its blobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_gguf, write_json

from minserve.errors import ModelLoadError
from minserve.models.finding.source import find_model


def write_ollama(store: Path, names: dict[str, str], media: str = "model") -> dict[str, Path]:
    """Write manifests, by ``name/tag`` each with the digest of its model; returns the blobs."""
    blobs = {}
    for name, digest in names.items():
        layers = [
            {"mediaType": f"application/vnd.ollama.image.{media}", "digest": f"sha256:{digest}"},
            {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:ffff"},
        ]
        write_json(store / "manifests/registry.ollama.ai/library" / name, {"layers": layers})
        blobs[name] = write_gguf(store / "blobs" / f"sha256-{digest}")
    return blobs


@pytest.mark.parametrize("given", ["models", ".", "models/blobs", "models/manifests"])
def test_the_only_model_of_ollama_is_found(tmp_path, given):
    blobs = write_ollama(tmp_path / "models", {"llama3.2/latest": "1234abcd" * 8})
    source = find_model(str(tmp_path / given))
    assert (source.name, source.gguf_file) == ("llama3.2", blobs["llama3.2/latest"])


def test_several_models_of_ollama_are_listed_and_each_can_be_named(tmp_path):
    names = {"llama3.2/latest": "a" * 64, "qwen3/0.6b": "b" * 64, "qwen3/4b": "c" * 64}
    blobs = write_ollama(tmp_path, names)
    with pytest.raises(
        ModelLoadError, match=r"3 models of Ollama.*llama3\.2 .*qwen3:0\.6b"
    ) as error:
        find_model(str(tmp_path))
    library = tmp_path / "manifests/registry.ollama.ai/library"
    assert str(library / "qwen3/4b") in str(error.value)
    for given in (library / "qwen3/4b", blobs["qwen3/4b"]):
        source = find_model(str(given))
        assert (source.name, source.gguf_file) == ("qwen3:4b", blobs["qwen3/4b"])
    assert find_model(str(library / "llama3.2")).name == "llama3.2"


def test_tags_of_one_file_are_one_model(tmp_path):
    write_ollama(tmp_path, {"qwen3/0.6b": "b" * 64, "qwen3/latest": "b" * 64})
    assert find_model(str(tmp_path)).gguf_file == tmp_path / "blobs" / f"sha256-{'b' * 64}"


def test_a_blob_without_a_manifest_has_a_short_name(tmp_path):
    blob = write_gguf(tmp_path / f"sha256-{'d' * 64}")
    assert find_model(str(blob)).name == "sha256-dddddddddddd"


def test_ollamas_store_without_the_model_says_so(tmp_path):
    blobs = write_ollama(tmp_path, {"qwen3/4b": "c" * 64})
    blobs["qwen3/4b"].unlink()
    with pytest.raises(ModelLoadError, match="qwen3:4b is missing; run 'ollama pull qwen3:4b'"):
        find_model(str(tmp_path))
