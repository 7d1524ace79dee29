"""Reading weights: `open_checkpoint` returns a model's tensors by their Hugging Face names.

There are three formats: safetensors, pytorch_model.bin, GGUF. No code from a checkpoint is run:
pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.files import first_line, unreadable
from minserve.models.finding.foreign_folders import explain_folder
from minserve.models.finding.source import ModelSource
from minserve.models.gguf_files.gguf_checkpoint import GGUFCheckpoint
from minserve.models.weights.checkpoint import Checkpoint, TensorHeader
from minserve.models.weights.packed_weights import PackedCheckpoint, refuse_unexplained
from minserve.models.weights.quantization import read_quantization
from minserve.models.weights.weight_files import WeightFiles, find_weights


def open_checkpoint(source: ModelSource, *, progress: bool = True) -> Checkpoint:
    """Open a model's weights, whatever the format in which they are stored.

    `find_weights` says which files of a folder are chosen. Quantized weights are offered unpacked.
    The result is a context manager.

    Raises:
        ModelLoadError: if there are no weights, or a file is missing, cut short or corrupt.
        UnsupportedModelError: if they are in a form that is not read, those of an adapter, or
            quantized in a form that cannot be read.
    """
    if source.gguf_file is not None:
        return GGUFCheckpoint(source.gguf_file, progress=progress)
    form = read_quantization(source.config_dir)
    weights = find_weights(source.config_dir, source.weights_file)
    if weights is None:
        raise explain_folder(source.config_dir)
    kind = SafetensorsCheckpoint if weights.format == "safetensors" else BinCheckpoint
    stored = kind(weights, progress=progress)
    _refuse_adapter(stored)
    if form is not None:
        return PackedCheckpoint(stored, form, progress=progress)
    refuse_unexplained(stored)
    return stored


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    """Refuse weights that are those of an adapter, or not complete without it."""
    for name in checkpoint.names():
        if ".lora_A." in name:
            raise UnsupportedModelError(
                f"{checkpoint.describe(name)}: holds a LoRA adapter beside or in place of weights "
                f"(tensor {name!r}); merge it first: peft's merge_and_unload(), then "
                "save_pretrained()"
            )


class SafetensorsCheckpoint(Checkpoint):
    """One or several safetensors files. Memory-mapped."""

    def __init__(self, weights: WeightFiles, *, progress: bool = True) -> None:
        self._handles: dict[Path, Any] = {}
        files = weights.index or {
            name: file for file in weights.files for name in list(self._open(file).keys())
        }
        super().__init__(weights.path, files, progress=progress)

    def _open(self, file: Path, stored: str | None = None) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                _fail(file, stored, error)
        return self._handles[file]

    def _header(self, stored: str, file: Path) -> TensorHeader:
        entry = self._ask(file, stored, lambda handle: handle.get_slice(stored))
        return TensorHeader(tuple(entry.get_shape()), entry.get_dtype())

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
    """One or several files of torch. Memory-mapped, unless they are older than torch 1.6."""

    def __init__(self, weights: WeightFiles, *, progress: bool = True) -> None:
        self._loaded: dict[Path, dict[str, torch.Tensor]] = {}
        files = weights.index or {name: file for file in weights.files for name in self._load(file)}
        super().__init__(weights.path, files, progress=progress)

    def _load(self, file: Path, stored: str | None = None) -> dict[str, torch.Tensor]:
        if file not in self._loaded:
            try:
                # Files older than torch 1.6 are no zip archives and cannot be mapped.
                state = torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
            except Exception as error:  # a broken pickle can raise nearly anything
                _fail(file, stored, error)
            if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
                _fail(file, stored, TypeError("it holds no dictionary of tensors by name"))
            self._loaded[file] = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        return self._loaded[file]

    def _header(self, stored: str, file: Path) -> TensorHeader:
        tensor = self._read(stored, file)
        return TensorHeader(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        tensors = self._load(file, stored)
        if stored not in tensors:
            _fail(file, stored, KeyError("the index names it, the file does not hold it"))
        return tensors[stored].detach()

    def close(self) -> None:
        super().close()
        self._loaded.clear()


def _fail(file: Path, stored: str | None, error: Exception) -> NoReturn:
    """Raise what is wrong with a file that a library could not read."""
    if file.exists() and not os.access(file, os.R_OK, effective_ids=True):
        # safetensors says of such a file that there is none.
        denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        raise unreadable(file, denied) from error
    if not file.stat().st_size:
        raise ModelLoadError(f"{file}: the file is empty; download it again") from error
    where = f"{file}: tensor {stored!r} " if stored else f"{file}: "
    reason = error.args[0] if isinstance(error, KeyError) and error.args else first_line(error)
    raise ModelLoadError(
        f"{where}cannot be read; the file may be cut short or corrupt ({reason})"
    ) from error
