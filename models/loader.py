"""Reading weights: `open_checkpoint` returns a model's tensors by their Hugging Face names.

There are three formats: safetensors, pytorch_model.bin, GGUF. No code from a checkpoint is run:
pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from minserve.errors import ModelLoadError
from minserve.models.checkpoint import Checkpoint
from minserve.models.gguf_checkpoint import GGUFCheckpoint
from minserve.models.json_file import read_json
from minserve.models.packed_weights import PackedCheckpoint, refuse_unexplained
from minserve.models.quantization import read_quantization
from minserve.models.source import PYTORCH_BIN, SAFETENSORS, ModelSource, first_line


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
