"""Reading GGUF files: header, metadata and tensors. Independent of model families."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minserve.errors import ModelLoadError

if TYPE_CHECKING:
    import torch

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
_MAX_DIMS = 4
# Bytes of magic and version, with which every file begins.
_SHORTEST = 8
# ggml types whose values are torch's, with the names of its dtypes.
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's entry in a GGUF file: shape in torch's order, ggml type, start, size in bytes."""

    shape: tuple[int, ...]
    type: int
    start: int
    size: int


class GGUFFile:
    """The header of a GGUF file (version 2 or 3, little-endian), and its tensors on demand.

    The `gguf` package knows the block formats and is used for these. Its reader makes a NumPy
    array of each vocabulary entry, which takes seconds, so the header is read here.
    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Attributes:
        metadata: keys to Python values; arrays are lists.
        tensors: GGUF names to entries; every entry was checked to lie within the file.

    Raises:
        ModelLoadError: naming the file, if it is cut short, corrupt or not a GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < _SHORTEST:
                what = f"not a GGUF file ({size} bytes)" if size else "the file is empty"
                raise ModelLoadError(f"{path}: {what}; download it again")
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: not a GGUF file ({error})") from error
        magic, version = struct.unpack_from("<4sI", self._data)
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
        """Return a metadata value that the model cannot do without.

        Raises:
            ModelLoadError: if it is missing or of another type.
        """
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise ModelLoadError(
                f"{self.path}: metadata {key!r} should be one {kind.__name__}, not {value!r:.80}"
            )
        return value

    def tensor(self, name: str) -> GGUFTensor:
        """Return a tensor's entry, by its GGUF name.

        Raises:
            ModelLoadError: if there is no such tensor.
        """
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path}: tensor {name!r} is missing")
        return self.tensors[name]

    def read(self, name: str, rounded_to: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor in torch's order of dimensions.

        It has its stored dtype if that is float32, float16 or bfloat16; quantized tensors have the
        dtype ``rounded_to``, by default float32. The caller owns it.

        Raises:
            ModelLoadError: if the tensor is missing or of a type that cannot be read.
        """
        # Processes that only need the tokenizer do without torch, which takes seconds to import.
        import torch
        from gguf.constants import GGMLQuantizationType

        from minserve.models.gguf_files.gguf_dequantize import dequantize

        entry = self.tensor(name)
        kind = GGMLQuantizationType(entry.type)
        raw = np.frombuffer(self._data, np.uint8, entry.size, entry.start)
        if kind.name in _PLAIN:
            dtype = getattr(torch, _PLAIN[kind.name])
            return torch.from_numpy(raw.copy()).view(dtype).view(entry.shape)
        try:
            return dequantize(raw, kind, rounded_to or torch.float32).view(entry.shape)
        except NotImplementedError as error:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which is no weight type "
                "that can be read"
            ) from error

    def _read_header(self) -> None:
        num_tensors, num_values = self._take("Q"), self._take("Q")
        for _ in range(num_values):
            key = self._take_string()
            self.metadata[key] = self._take_value(self._take("I"))
        infos = []
        for _ in range(num_tensors):
            name, num_dims = self._take_string(), self._take("I")
            if num_dims > _MAX_DIMS:
                raise ValueError(f"tensor {name!r:.80} has {num_dims} dimensions")
            dims = [self._take("Q") for _ in range(num_dims)]
            infos.append((name, dims[::-1], self._take("I"), self._take("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r:.80}")
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
            # Each takes 8 bytes at least: a false count fails here and not at the file's end.
            if count * 8 > len(self._data) - self._at:
                raise ValueError(f"an array of {count} strings runs over the end")
            return [self._take_string() for _ in range(count)]
        code = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return list(values)


def token_id(metadata: Mapping[str, Any], name: str, path: Path) -> int | None:
    """Return the id of a special token such as ``eos``, if a file's metadata name it.

    Raises:
        ModelLoadError: naming the file and the key whose value is no token's id.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise ModelLoadError(f"{path}: metadata {key!r} should be a token's id, not {value!r:.80}")
    return value
