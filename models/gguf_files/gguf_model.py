"""`GGUFModel`: the metadata and the tensors of a model in GGUF form, in one file or in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.gguf_files.gguf_file import GGUFFile, GGUFTensor
from minserve.models.gguf_files.gguf_split import gguf_parts

# The names of architectures in llama.cpp. "llama" is Mistral's too, and that of many others.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "granite", "smollm3", "gemma")


class GGUFModel:
    """A model of one of `ARCHITECTURES`. All keys below are without the architecture's prefix.

    Attributes:
        path: the file, or the first part.
        architecture: llama.cpp's name of the model family.
        metadata: keys to Python values, of the first part: the others repeat none of it.
        tensors: GGUF names to entries, of all parts.

    Raises:
        UnsupportedModelError: for another architecture, and for a mixture of experts.
        ModelLoadError: naming the file, if a part is missing or does not belong to the others, or
            a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        paths = gguf_parts(path)
        files = [GGUFFile(part) for part in paths]
        self.path = paths[0]
        self.metadata = files[0].metadata
        self.architecture: str = files[0].require("general.architecture", str)
        self._check_architecture()
        self._first = files[0]
        self._file_of = _tensors_of(files)
        self.tensors: dict[str, GGUFTensor] = {
            name: file.tensors[name] for name, file in self._file_of.items()
        }

    def _check_architecture(self) -> None:
        kind = self.architecture
        experts = self.optional("expert_count", int, 0) if kind in ARCHITECTURES else 0
        if kind not in ARCHITECTURES or experts:
            named = repr(kind) + (f" with {experts} experts" if experts else "")
            raise UnsupportedModelError(
                f"{self.path}: GGUF architecture {named} is not supported; minserve runs "
                f"{', '.join(ARCHITECTURES)}, without experts"
            )

    def key(self, name: str) -> str:
        """Return a key with the architecture's prefix, as it stands in the file."""
        return f"{self.architecture}.{name}"

    def require(self, name: str, kind: type) -> Any:
        """Return a value that the model cannot do without.

        Args:
            name: the key.
            kind: ``int``, ``float``, ``str`` or ``bool``. Whole numbers are taken as floats too.

        Raises:
            ModelLoadError: naming file and key, if it is missing or of another type.
        """
        value = self.metadata.get(self.key(name))
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _shortest(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelLoadError(
                f"{self.path}: metadata {self.key(name)!r} should be one {kind.__name__}, "
                f"not {value!r:.80}"
            )
        return value

    def optional(self, name: str, kind: type, default: Any) -> Any:
        """Return a value as `require` does, or ``default`` if the file does not have it."""
        return self.require(name, kind) if self.key(name) in self.metadata else default

    def head_counts(self) -> tuple[int, int]:
        """Return the numbers of query heads and of KV heads in each layer.

        Raises:
            ModelLoadError: if they are missing or make no sense.
        """
        heads = self.require("attention.head_count", int)
        kv_heads = self.optional("attention.head_count_kv", int, heads)
        if heads < 1 or kv_heads < 1:
            raise ModelLoadError(f"{self.path}: {heads} heads and {kv_heads} KV heads cannot be")
        return heads, kv_heads

    def tensor(self, name: str) -> GGUFTensor:
        """Return a tensor's entry, by its GGUF name.

        Raises:
            ModelLoadError: if there is no such tensor.
        """
        return self._holder(name).tensor(name)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, by its GGUF name."""
        return self._holder(name).path

    def read(self, name: str, rounded_to: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a tensor as `GGUFFile.read` does.

        Raises:
            ModelLoadError: if the tensor is missing or of a type that cannot be read.
        """
        return self._holder(name).read(name, rounded_to)

    def _holder(self, name: str) -> GGUFFile:
        """Return the file that holds a tensor; the first one, which misses it, if none does."""
        return self._file_of.get(name, self._first)

    def read_numbers(self, name: str) -> list[float]:
        """Return the entries of a short vector, each as the shortest decimal that it rounds from.

        Raises:
            ModelLoadError: as `read` does, or if the tensor is no vector.
        """
        vector = self.read(name)
        if vector.dim() != 1:
            raise ModelLoadError(
                f"{self.file_of(name)}: tensor {name!r} has shape {tuple(vector.shape)}, "
                "but should be a vector"
            )
        return [_shortest(value) for value in vector.tolist()]


def _shortest(value: float) -> float:
    """Return the decimal number that a config.json would have: 1e-05, not 9.999999747378752e-06.

    GGUF keeps numbers as float32. The result is the same float32.
    """
    return float(str(np.float32(value)))


def _tensors_of(files: list[GGUFFile]) -> dict[str, GGUFFile]:
    """Return the names of all tensors and where they are; check that the parts are of one model."""
    found: dict[str, GGUFFile] = {}
    for number, file in enumerate(files):
        count, here = (file.metadata.get(f"split.{key}", 0) for key in ("count", "no"))
        if (count or 1) != len(files) or here != number:
            raise ModelLoadError(
                f"{file.path}: its name says part {number + 1} of {len(files)}, its header part "
                f"{here!r:.20} (from 0) of {count!r:.20}; parts need their names "
                "(name-00001-of-00003.gguf)"
            )
        for name in file.tensors:
            if name in found:
                raise ModelLoadError(
                    f"{file.path}: tensor {name!r} is also in {found[name].path.name}; "
                    "these are not the parts of one model"
                )
            found[name] = file
    total = files[0].metadata.get("split.tensors.count", len(found))
    if total != len(found):
        raise ModelLoadError(
            f"{files[0].path}: {total!r:.20} tensors should be in {len(files)} files, but "
            f"{len(found)} are; these are not the parts of one model"
        )
    return found
