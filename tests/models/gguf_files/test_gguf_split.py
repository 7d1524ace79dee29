"""The parts of a split GGUF model are found from any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from minserve.errors import ModelLoadError
from minserve.models.gguf_files.gguf_split import gguf_parts


def named(folder: Path, *numbers: int, count: int = 3) -> list[Path]:
    """Empty files with the names of parts."""
    files = [folder / f"m-{i:05d}-of-{count:05d}.gguf" for i in numbers]
    for file in files:
        file.touch()
    return files


def test_all_parts_are_found_from_each_in_their_order(tmp_path: Path) -> None:
    parts = named(tmp_path, 3, 1, 2)
    named(tmp_path, 1, 2, count=2)  # another model's
    assert all(gguf_parts(part) == sorted(parts) for part in parts)


@pytest.mark.parametrize("name", ["m.gguf", "m-1-of-3.gguf", "m-00001-of-00003-Q4.gguf"])
def test_other_names_are_of_files_that_stand_alone(tmp_path: Path, name: str) -> None:
    assert gguf_parts(tmp_path / name) == [tmp_path / name]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first, _ = named(tmp_path, 1, 3)
    with pytest.raises(ModelLoadError, match=r"m-00002-of-00003\.gguf.*missing"):
        gguf_parts(first)


@pytest.mark.parametrize(("number", "count"), [(0, 3), (4, 3), (1, 0)])
def test_a_number_that_cannot_be_is_refused(tmp_path: Path, number: int, count: int) -> None:
    [part] = named(tmp_path, number, count=count)
    with pytest.raises(ModelLoadError, match=rf"{part.name}.*part {number} of {count}"):
        gguf_parts(part)
