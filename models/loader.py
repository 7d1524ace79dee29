"""Reading weights: `open_checkpoint` returns a model's tensors by their Hugging Face names.

There are three formats: safetensors, pytorch_model.bin, GGUF. No code from a checkpoint is run:
pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import math
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from minserve.errors import ModelLoadError
from minserve.models.gguf_file import GGUFFile
from minserve.models.json_file import read_json
from minserve.models.quantization import read_quantization
from minserve.models.source import PYTORCH_BIN, SAFETENSORS, ModelSource, first_line

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
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


def open_checkpoint(source: ModelSource, *, progress: bool = True) -> Checkpoint:
    """Open a model's weights, whatever the format in which they are stored.

    A folder's single safetensors file is preferred, then sharded safetensors, then
    pytorch_model.bin in the same order. Quantized weights are offered unpacked. The result is a
    context manager.

    Raises:
        UnsupportedModelError: if weights are quantized in a form that cannot be read.
        ModelLoadError: if there are no weights, or a file is missing, cut short or corrupt.
    """
    if source.gguf_file is not None:
        return GGUFCheckpoint(source.gguf_file, progress=progress)
    # Not above: these modules build on this one.
    from minserve.models.packed_weights import PackedCheckpoint, refuse_unexplained

    form = read_quantization(source.config_dir)
    stored = _open_folder(source.config_dir, progress=progress)
    if form is not None:
        return PackedCheckpoint(stored, form, progress=progress)
    refuse_unexplained(stored)
    return stored


def _open_folder(folder: Path, *, progress: bool) -> Checkpoint:
    for file, kind in ((SAFETENSORS, SafetensorsCheckpoint), (PYTORCH_BIN, BinCheckpoint)):
        if (folder / file).is_file() or (folder / f"{file}.index.json").is_file():
            return kind(folder, progress=progress)
    raise ModelLoadError(f"{folder}: no weights here; looked for {SAFETENSORS} and {PYTORCH_BIN}")


class Checkpoint(ABC):
    """A set of named tensors on disk, read one at a time.

    Names are Hugging Face names with their full prefix (``model.layers.0...``,
    ``model.decoder.layers.0...``, ``lm_head.weight``). This holds even if the file leaves out
    ``model.``, as checkpoints of a bare base model do.
    """

    def __init__(self, path: Path, files: Mapping[str, Path], *, progress: bool) -> None:
        """``path``: the file or folder to name in errors; ``files``: stored name -> its file."""
        self._path = path
        self._files = dict(files)
        self._stored = {_full_name(name): name for name in files}
        # If a file has both spellings of a name, the full name counts.
        self._stored.update({name: name for name in files if _full_name(name) == name})
        self._progress = progress
        self._bar: tqdm | None = None

    @property
    def path(self) -> Path:
        """The file or folder of the weights."""
        return self._path

    def names(self) -> set[str]:
        """Return the names of all tensors. A tied head has no ``lm_head.weight``."""
        return set(self._stored)

    def describe(self, name: str) -> str:
        """Return the file that holds a tensor, for messages; the model's path if none does."""
        return str(self._files.get(self._stored.get(name, name), self._path))

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Read one tensor, on the CPU, in its stored floating-point dtype (GGUF: float32).

        ``shape`` is the shape that the model expects; ``None`` allows any shape. The tensor may be
        a view of the mapped file: copy it, never write to it.

        Raises:
            ModelLoadError: naming file and tensor, if the tensor is missing, unreadable, of another
                shape, or not of a floating-point dtype.
        """
        tensor = self.read(name)
        where = f"{self.describe(name)}: tensor {name!r}"
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ModelLoadError(f"{where} has dtype {tensor.dtype}, which is not a weight's")
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ModelLoadError(
                f"{where} has shape {tuple(tensor.shape)}, but the model's "
                f"configuration needs {tuple(shape)}"
            )
        self._advance()
        return tensor

    def get_ids(self, name: str, below: int) -> torch.Tensor:
        """Read a vector of token ids, which must all differ and lie below ``below``; int64.

        Raises:
            ModelLoadError: if the vector is missing, unreadable or holds something else.
        """
        ids = self.read(name)
        good = ids.dim() == 1 and not ids.dtype.is_floating_point and len(ids.unique()) == len(ids)
        if not good or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= below:
            raise ModelLoadError(
                f"{self.describe(name)}: tensor {name!r} does not hold different token ids "
                f"below {below}"
            )
        self._advance()
        return ids.long()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor of any dtype and shape, as it is stored.

        Raises:
            ModelLoadError: if it is missing or unreadable.
        """
        return self._read(*self._place(name))

    def num_elements(self, name: str) -> int:
        """Return the number of elements of one tensor, from the file's header.

        Raises:
            ModelLoadError: if the tensor is missing.
        """
        return self._num_elements(*self._place(name))

    def _place(self, name: str) -> tuple[str, Path]:
        """Return a tensor's stored name and its file."""
        if name not in self._stored:
            raise ModelLoadError(f"{self._path}: tensor {name!r} is missing")
        return self._stored[name], self._files[self._stored[name]]

    def num_parameters(self) -> int:
        """Return the number of elements of all tensors, from the files' headers.

        pytorch_model.bin has no header, so it is loaded.
        """
        return sum(self._num_elements(stored, file) for stored, file in self._files.items())

    @abstractmethod
    def _num_elements(self, stored: str, file: Path) -> int:
        """Return the number of elements of one tensor."""

    @abstractmethod
    def _read(self, stored: str, file: Path) -> torch.Tensor:
        """Read a tensor by its stored name from its file."""

    def _advance(self) -> None:
        if self._bar is None:
            # Only on a terminal (None): in a log every update would add a line.
            self._bar = tqdm(
                total=len(self._stored),
                desc="Loading weights",
                unit="tensor",
                disable=None if self._progress else True,
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
    """Return stored name -> shard from ``<file>.index.json``; ``None`` if one file holds all."""
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

    def _num_elements(self, stored: str, file: Path) -> int:
        return math.prod(
            self._ask(file, stored, lambda handle: handle.get_slice(stored).get_shape())
        )

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        return self._ask(file, stored, lambda handle: handle.get_tensor(stored))

    def _ask(self, file: Path, stored: str, ask: Callable[[Any], Any]) -> Any:
        """Return what ``ask`` finds out about a tensor from its open file.

        Raises:
            ModelLoadError: if the file or the tensor cannot be read.
        """
        from safetensors import SafetensorError

        try:
            return ask(self._open(file, stored))
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

    def _num_elements(self, stored: str, file: Path) -> int:
        return self._read(stored, file).numel()

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
    reason = error.args[0] if isinstance(error, KeyError) and error.args else first_line(error)
    raise ModelLoadError(
        f"{where}cannot be read; the file may be cut short or corrupt ({reason})"
    ) from error


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

    def _num_elements(self, stored: str, file: Path) -> int:
        return math.prod(self._gguf.tensor(self._origin[stored]).shape)

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        origin = self._origin[stored]
        tensor = self._gguf.read(origin)
        heads = self._heads.get(origin.split(".")[-2])
        if heads is None or tensor.shape[0] % (2 * heads):
            return tensor  # not permuted, or of a wrong shape that `get` will report
        return _unpermute(tensor, heads)


def _name_from_gguf(name: str) -> str | None:
    """Return the Hugging Face name of a llama tensor; ``None`` for a tensor that is no weight."""
    stem, _, suffix = name.rpartition(".")
    if stem in _GGUF_NAMES:
        return f"{_GGUF_NAMES[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _GGUF_LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_GGUF_LAYER_NAMES[match[2]]}.{suffix}"


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a q or k projection back from GGUF's order into Hugging Face's order.

    GGUF rotates neighbouring rows (0, 1), (2, 3), ..; Hugging Face rotates row i of a head
    with row i + head_dim / 2. Input and output are ``[heads * head_dim, ...]``.
    """
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
