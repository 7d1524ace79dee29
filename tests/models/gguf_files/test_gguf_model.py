"""A GGUF model's parts belong together, and are one model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf_models import NORM, tiny_model

from minserve.errors import ModelLoadError
from minserve.models.finding.source import ModelSource, fingerprint
from minserve.models.gguf_files.gguf_checkpoint import GGUFCheckpoint
from minserve.models.gguf_files.gguf_config import gguf_config
from minserve.models.gguf_files.gguf_model import GGUFModel
from shared.reference_models.gguf_writer import write_gguf


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The three files of a split model."""
    write_gguf(tiny_model(), tmp_path / "m.gguf", max_tensors=8)
    return sorted(tmp_path.glob("*.gguf"))


def test_the_first_part_has_the_metadata_of_all(parts: list[Path]) -> None:
    models = [GGUFModel(part) for part in parts]
    assert all(model.path == parts[0] for model in models)
    assert all(model.require("block_count", int) == 2 for model in models)
    assert all(model.tensors == models[0].tensors for model in models)
    assert {models[0].file_of(name) for name in models[0].tensors} == set(parts)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(ModelLoadError, match=r"m-00002-of-00003\.gguf.*missing"):
        GGUFModel(parts[0])


def test_a_part_under_another_name_says_what_it_is(parts: list[Path], tmp_path: Path) -> None:
    alone = Path(shutil.copy(parts[0], tmp_path / "alone.gguf"))
    with pytest.raises(ModelLoadError, match=r"alone\.gguf.*part 1 of 1.*part 0 \(from 0\) of 3"):
        GGUFModel(alone)
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ModelLoadError, match=r"m-00003-of-00003\.gguf.*part 3 of 3.*part 1 \("):
        GGUFModel(parts[0])


def test_parts_of_different_models_are_noticed(parts: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    # As many parts, with other tensors in them.
    write_gguf(tiny_model(num_hidden_layers=1), other / "m.gguf", max_tensors=5)
    shutil.copy(other / parts[2].name, parts[2])
    with pytest.raises(ModelLoadError, match=r"not the parts of one model"):
        GGUFModel(parts[0])


@pytest.mark.parametrize("family", ["granite", "phi3"])
def test_any_flipped_header_byte_never_crashes(tmp_path: Path, family: str) -> None:
    """Whatever is broken, the caller sees a ModelLoadError, or a model that can be read."""
    good = write_gguf(tiny_model(family), tmp_path / "good.gguf").read_bytes()
    file = tmp_path / "bad.gguf"
    refusals = []
    for position in range(0, 1500, 7):
        file.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        try:
            gguf_config(GGUFModel(file))
            GGUFCheckpoint(file).get(NORM)
        except ModelLoadError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert all("bad.gguf" in message for message in refusals)


def test_the_fingerprint_is_of_all_parts(parts: list[Path]) -> None:
    source = ModelSource("m", parts[0].parent, parts[0])
    before = fingerprint(source)
    assert fingerprint(source) == before
    data = parts[2].read_bytes()
    parts[2].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fingerprint(source) != before
