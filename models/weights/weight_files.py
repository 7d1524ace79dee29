"""`find_weights`: which files of a Hugging Face folder hold the weights."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minserve.errors import ModelLoadError
from minserve.models.finding.files import file_names, listed, refuse_pointers, starts_with
from minserve.models.finding.json_file import read_json

SAFETENSORS, PYTORCH_BIN = "model.safetensors", "pytorch_model.bin"
Format = Literal["safetensors", "bin"]
# A shard's name, with the number of the shard and how many there are.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
# Files that lie beside weights and are none, or not those of the model as a whole.
_OTHERS = re.compile(
    r"adapter_model.*|consolidated.*|training_args\.bin|optimizer.*|scheduler.*|"
    r"random_states.*|openvino.*|rng_state.*|scaler.*"
)
_PICKLE_START = b"\x80"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a model's weights.

    Attributes:
        path: the file or folder to name in errors.
        files: all files.
        index: stored name -> its file, by the index of shards; ``None`` if the files tell.
    """

    format: Format
    path: Path
    files: tuple[Path, ...]
    index: Mapping[str, Path] | None = None


def find_weights(folder: Path, file: Path | None = None) -> WeightFiles | None:
    """Find the weights in a folder.

    A single file of the usual name is preferred, then shards with an index, then shards without
    one, then a single file of another name; in each form, safetensors before pytorch_model.bin.

    Args:
        file: the file that is meant, where the user has named one; a shard stands for all.

    Returns:
        the files; ``None`` if there are none.

    Raises:
        ModelLoadError: if a shard is missing, a file is a pointer of git-lfs, or it is not clear
            which files are meant.
    """
    if file is not None:
        shard = _SHARD.fullmatch(file.name)
        found: WeightFiles | None = _shards(folder, shard[1], shard[4]) if shard else _single(file)
    else:
        found = (
            _indexed(folder, SAFETENSORS)
            or _indexed(folder, PYTORCH_BIN)
            or _unnamed(folder, ".safetensors")
            or _unnamed(folder, ".bin")
        )
    if found is not None:
        refuse_pointers(found.files)
    return found


def is_shard(name: str) -> bool:
    """Return whether a file's name is that of one of several shards."""
    return _SHARD.fullmatch(name) is not None


def _single(file: Path) -> WeightFiles:
    return WeightFiles(_format(file.suffix), file, (file,))


def _format(suffix: str) -> Format:
    return "safetensors" if suffix == ".safetensors" else "bin"


def _indexed(folder: Path, name: str) -> WeightFiles | None:
    """Return the file of the usual name, or the shards that its index lists."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return _single(folder / name)
    if not index.is_file():
        return None
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelLoadError(f"{index}: has no weight_map")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelLoadError(f"{index}: tensor {tensor!r} is said to be in {shard!r}, no file")
    missing = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
    if missing:
        tensor = next(tensor for tensor, shard in shards.items() if shard == missing[0])
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise ModelLoadError(
            f"{index}: shard {missing[0]!r}{others}, which holds {tensor!r}, is missing; download "
            "it again"
        )
    files = tuple(folder / shard for shard in sorted(set(shards.values())))
    by_name = {tensor: folder / shard for tensor, shard in shards.items()}
    return WeightFiles(_format(Path(name).suffix), folder, files, by_name)


def _unnamed(folder: Path, suffix: str) -> WeightFiles | None:
    """Return shards without an index, or a single file of another name than the usual one."""
    names = [name for name in sorted(file_names(folder)) if name.endswith(suffix)]
    names = [name for name in names if not _OTHERS.fullmatch(name)]
    if suffix == ".bin":
        usual = PYTORCH_BIN.removesuffix(suffix)
        names = [name for name in names if name.startswith(usual) or _is_of_torch(folder / name)]
    stems = sorted({shard[1] for name in names if (shard := _SHARD.fullmatch(name))})
    whole = [name for name in names if not is_shard(name)]
    if len(stems) + len(whole) > 1:
        one = whole[0] if whole else next(name for name in names if is_shard(name))
        raise ModelLoadError(
            f"{folder}: several files may be the model's weights ({listed(names)}); give the path "
            f"of one, such as {folder / one}"
        )
    if stems:
        return _shards(folder, stems[0], suffix)
    return _single(folder / whole[0]) if whole else None


def _is_of_torch(file: Path) -> bool:
    """Return whether a .bin file may be torch's, and not some other program's."""
    return zipfile.is_zipfile(file) or starts_with(file, _PICKLE_START)


def _shards(folder: Path, stem: str, suffix: str) -> WeightFiles:
    """Return all shards of a name.

    Raises:
        ModelLoadError: if one of them is missing.
    """
    shards = [shard for name in file_names(folder) if (shard := _SHARD.fullmatch(name))]
    counts = sorted({shard[3] for shard in shards if (shard[1], shard[4]) == (stem, suffix)})
    if len(counts) > 1:
        raise ModelLoadError(
            f"{folder}: holds shards of two models under the name {stem!r} "
            f"(-of-{', -of-'.join(counts)}); remove those that do not belong to it"
        )
    wanted = [f"{stem}-{i + 1:05}-of-{counts[0]}{suffix}" for i in range(int(counts[0]))]
    present = {shard[0] for shard in shards}
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ModelLoadError(
            f"{folder}: of {len(wanted)} shards of the weights {len(missing)} are missing "
            f"({listed(missing)}); download them again"
        )
    return WeightFiles(_format(suffix), folder, tuple(folder / name for name in wanted))
