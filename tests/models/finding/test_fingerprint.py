"""A model's files have the same fingerprint wherever they are, and no others have it."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from minserve.models.finding.source import find_model, fingerprint

# All of a file of so many bytes is looked at, at any rate.
SMALL = 64 * 4096


def fingerprint_of(path: Path) -> str:
    return fingerprint(find_model(str(path)))


def write_model(folder: Path, weights: bytes, name: str = "model.safetensors") -> Path:
    """What looks like a model from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / name).write_bytes(weights)
    return folder


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_copy_elsewhere_has_the_same(tiny_llama_dir: Path, tmp_path: Path) -> None:
    expected = fingerprint_of(tiny_llama_dir)
    assert re.fullmatch(r"[0-9a-f]{12}", expected)
    for folder in (tmp_path / "a" / tiny_llama_dir.name, tmp_path / "another-name"):
        shutil.copytree(tiny_llama_dir, folder)
        assert fingerprint_of(folder) == expected


def test_another_model_has_another(tiny_llama_dir: Path, tiny_opt_dir: Path) -> None:
    assert fingerprint_of(tiny_llama_dir) != fingerprint_of(tiny_opt_dir)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_003, SMALL])
def test_each_byte_of_a_small_file_counts(tmp_path: Path, size: int) -> None:
    rng = random.Random(size)
    folder = write_model(tmp_path / "model", rng.randbytes(size))
    weights = folder / "model.safetensors"
    original = fingerprint_of(folder)
    # Where two samples meet, and anywhere.
    places = {at + d for at in range(0, size + 1, 4096) for d in (-1, 0)}
    places |= {rng.randrange(size) for _ in range(50)}
    for at in sorted(place for place in places if 0 <= place < size):
        flip(weights, at)
        assert fingerprint_of(folder) != original, f"byte {at} of {size}"
        flip(weights, at)
    assert fingerprint_of(folder) == original


def test_a_large_file_of_other_weights_has_another(tmp_path: Path) -> None:
    rng = random.Random(0)
    found = {
        fingerprint_of(write_model(tmp_path / str(i), rng.randbytes(2_000_000))) for i in range(3)
    }
    assert len(found) == 3


def test_a_byte_more_makes_another(tmp_path: Path) -> None:
    zeros = [bytes(size) for size in (0, 1, 4096, 4097, 1_000_000, 1_000_001)]
    found = {fingerprint_of(write_model(tmp_path / str(len(one)), one)) for one in zeros}
    assert len(found) == len(zeros)


def test_the_first_and_the_last_bytes_of_a_large_file_count(tmp_path: Path) -> None:
    size = 5_000_000
    folder = write_model(tmp_path / "model", bytes(size))
    original = fingerprint_of(folder)
    for at in (0, 4095, size - 4096, size - 1):
        flip(folder / "model.safetensors", at)
        assert fingerprint_of(folder) != original, at
        flip(folder / "model.safetensors", at)


def test_another_config_makes_another(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", b"weights")
    original = fingerprint_of(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 500000.0}')
    assert fingerprint_of(folder) != original


@pytest.mark.parametrize("kind", ["model-{}.safetensors", "pytorch_model-{}.bin"])
def test_all_of_several_files_count_and_each_in_its_place(tmp_path: Path, kind: str) -> None:
    def folder(name: str, first: bytes, second: bytes) -> Path:
        write_model(tmp_path / name, second, kind.format("00002-of-00002"))
        return write_model(tmp_path / name, first, kind.format("00001-of-00002"))

    models = [(b"a" * 5000, b"b" * 5000), (b"b" * 5000, b"a" * 5000), (b"a" * 5000, b"a" * 5000)]
    found = [fingerprint_of(folder(str(i), *files)) for i, files in enumerate(models)]
    assert len(set(found)) == 3
    assert fingerprint_of(folder("again", *models[0])) == found[0]


def test_what_is_beside_the_weights_does_not_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", b"weights")
    original = fingerprint_of(folder)
    (folder / "README.md").write_text("trained with love")
    (folder / "optimizer.pt").write_bytes(b"0" * 1000)
    assert fingerprint_of(folder) == original


def test_a_gguf_file_counts_alone(tmp_path: Path) -> None:
    weights = random.Random(0).randbytes(10_000)
    files = [tmp_path / folder / "model.gguf" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(weights)
    (tmp_path / "b" / "config.json").write_text("{}")
    (tmp_path / "b" / "other.gguf").write_bytes(b"another model")
    assert fingerprint_of(files[0]) == fingerprint_of(files[1])
    flip(files[1], 5000)
    assert fingerprint_of(files[0]) != fingerprint_of(files[1])


def test_the_embedded_model_has_one() -> None:
    assert re.fullmatch(r"[0-9a-f]{12}", fingerprint(find_model("smollm2")))
