"""Quantized checkpoints under the names of plain ones: a packed weight is unpacked when it is read.

A folder with quantized linears stores several tensors in place of ``X.weight``. `PackedCheckpoint`
offers ``X.weight`` in their place, in float32 with nothing lost, so that models need not know.
Where kernels run on packed weights, it is a `PackedTensor`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from minserve.errors import ModelLoadError
from minserve.models.tensor_part import TensorPart
from minserve.models.weights.checkpoint import WEIGHT_DTYPES, Checkpoint, Misfit, TensorHeader
from minserve.models.weights.packed_formats import PackedFormat
from minserve.models.weights.packed_tensor import PackedRows, PackedTensor

log = logging.getLogger(__name__)

# Tensors that only quantized folders have. Those in the first line are scales with which other
# engines round activations, queries, keys and values while a model runs; nothing is rounded here.
RUNTIME_SCALES = {
    *("input_scale", "output_scale", "input_zero_point", "output_zero_point"),
    *("input_global_scale", "activation_scale", "act_scale", "input_scale_ub"),
    *("q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale", "k_zero_point", "v_zero_point"),
}
# By these a folder is known to be quantized whose settings do not say so.
PACKED_PARTS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
GB = 1e9


class PackedCheckpoint(Checkpoint):
    """A checkpoint some of whose linears are quantized."""

    def __init__(self, stored: Checkpoint, form: PackedFormat, *, progress: bool = True) -> None:
        """``stored``: the tensors as they are on disk, which this object closes.

        Raises:
            ModelLoadError: if a weight is stored twice.
        """
        self._source = stored
        self._form = form
        self.form = form.title
        self._linears = _quantized_linears(stored, form)
        names = {}
        for name in stored.names():
            linear, _, part = name.rpartition(".")
            if part not in RUNTIME_SCALES and not (part in form.parts and linear in self._linears):
                names[name] = name
        for linear, mark in self._linears.items():
            plain = f"{linear}.weight"
            if plain in names:
                raise ModelLoadError(
                    f"{stored.describe(plain)}: tensor {plain!r} is stored plainly and, as "
                    f"{linear}.{mark}, packed"
                )
            names[plain] = f"{linear}.{mark}"
        files = {plain: Path(stored.describe(origin)) for plain, origin in names.items()}
        super().__init__(stored.path, files, progress=progress)
        self._is_logged = self._has_unpacked = False

    def _log(self) -> None:
        """Say once, at the first weight that is read, what becomes of the weights."""
        if self._is_logged:
            return
        self._is_logged = True
        files = {Path(self._source.describe(name)) for name in self._source.names()}
        on_disk = sum(file.stat().st_size for file in files)
        unpacked = 2 * self.num_parameters() / GB
        fate = f"are unpacked as they are loaded, to {unpacked:.3g} GB at 16 bits a weight"
        if self.keeps_packed:
            fate = f"stay packed; at 16 bits a weight they would take {unpacked:.3g} GB"
        notes = "".join(f"; {note}" for note in self._form.notes)
        log.info(
            "%s: %s weights, %.3g GB on disk, %s%s",
            self.path, self._form.title, on_disk / GB, fate, notes,
        )  # fmt: skip

    def misfits(self, names: Iterable[str]) -> list[Misfit]:
        marks = [*self._linears.values(), *self._form.marks]
        scale = next((mark for mark in marks if "scale" in mark), None)
        found = []
        for name in names:
            stored = self._stored.get(name)
            linear = self._linear(stored) if stored is not None else None
            if linear is not None:
                found += _misfits(name, linear, self._form)
                continue
            for one in super().misfits([name]):
                # Of numbers that are no floats and have no scales, the scales are missing.
                lacks = scale is not None and name.endswith(".weight")
                lost = f"{name.removesuffix('weight')}{scale}"
                found.append(Misfit(name, lost) if lacks else one)
        return found

    def packed_size(self) -> tuple[int, int]:
        weights, octets = 0, 0
        for name, mark in self._linears.items():
            linear = _Linear(self._source, name, mark)
            weights += math.prod(self._form.shape(linear))
            for part in self._form.parts:
                if linear.has(part):
                    header = self._source.header(f"{name}.{part}")
                    octets += math.prod(header.shape) * _octets(header.dtype)
        return weights, octets

    def _header(self, stored: str, file: Path) -> TensorHeader:
        linear = self._linear(stored)
        if linear is None:
            return self._source.header(stored)
        return TensorHeader(self._form.shape(linear), self._form.title)

    def _read(self, stored: str, file: Path) -> Tensor:
        linear = self._linear(stored)
        if linear is not None:
            return self._read_linear(linear)
        tensor = self._source.read(stored)
        if tensor.dtype not in WEIGHT_DTYPES and stored.endswith(".weight"):
            raise ModelLoadError(
                f"{file}: tensor {stored!r} has dtype {tensor.dtype}, so it needs scales, but "
                f"there is none of {', '.join(self._form.marks)} beside it"
            )
        return tensor

    def _read_part(self, stored: str, file: Path, part: TensorPart) -> Tensor:
        tensor = self._read(stored, file)
        return part.cut(tensor) if self._linear(stored) is None else part.copy(tensor)

    def _read_linear(self, linear: _Linear) -> Tensor:
        self._log()
        weight = self._form.read(linear)
        if self.keeps_packed:
            rows = PackedRows.of(weight)
            if rows is not None:
                return PackedTensor.of(rows)
            if not self._has_unpacked:
                self._has_unpacked = True
                log.warning(
                    "%s: no kernel runs on %s as it is packed, because its values have no 4 or 8 "
                    "bits or its groups no size that 16 divides; it and its like are unpacked, and "
                    "take the memory of unquantized weights",
                    self.path, linear.name,
                )  # fmt: skip
        return weight.dense()

    def _linear(self, name: str) -> _Linear | None:
        """Return the parts of the quantized linear whose weight has this name."""
        linear, _, part = name.rpartition(".")
        if part != "weight" or linear not in self._linears:
            return None
        return _Linear(self._source, linear, self._linears[linear])

    def close(self) -> None:
        super().close()
        self._source.close()


def _misfits(weight: str, linear: _Linear, form: PackedFormat) -> list[Misfit]:
    """Return what is wrong with the parts of a quantized weight, by their names and shapes."""
    try:
        wanted = form.beside(linear)
    except ModelLoadError as error:
        return [Misfit(weight, weight, str(error))]
    found = []
    for part, shapes in wanted.items():
        name = f"{linear.name}.{part}"
        if not linear.has(part):
            found.append(Misfit(weight, name))
        elif shapes is not None and linear.shape(part) not in shapes:
            needed = max(shapes, key=len)
            found.append(Misfit(weight, name, f"has shape {linear.shape(part)}, not {needed}"))
    return found


class _Linear:
    """The `StoredParts` of a quantized linear in a checkpoint."""

    def __init__(self, source: Checkpoint, name: str, mark: str) -> None:
        self.name = name
        self._source = source
        self._mark = mark

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self._source.names()

    def shape(self, part: str) -> tuple[int, ...]:
        self._require(part)
        return self._source.header(f"{self.name}.{part}").shape

    def read(
        self, part: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None
    ) -> Tensor:
        self._require(part)
        tensor = self._source.read(f"{self.name}.{part}")
        if tensor.dtype not in dtypes:
            words = ", ".join(str(dtype) for dtype in dtypes)
            self.fail(part, f"has dtype {tensor.dtype}, but must be one of {words}")
        if shape is not None and tuple(tensor.shape) != shape:
            self.fail(
                part,
                f"has shape {tuple(tensor.shape)}, but the weight's other tensors and the "
                f"quantization's settings need {shape}",
            )
        return tensor

    def _require(self, part: str) -> None:
        if not self.has(part):
            self.fail(part, f"is missing, and {self.name}.{self._mark} needs it")

    def fail(self, part: str, reason: str) -> NoReturn:
        name = f"{self.name}.{part}"
        raise ModelLoadError(f"{self._source.describe(name)}: tensor {name!r} {reason}")


def _octets(dtype: str) -> int:
    """Return the size of a dtype by its name in a header, such as ``F8_E4M3`` or ``bfloat16``."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def refuse_unexplained(stored: Checkpoint) -> None:
    """Refuse packed weights whose folder has no settings that say how they are packed.

    Raises:
        ModelLoadError: naming the folder and a tensor.
    """
    for name in sorted(stored.names()):
        if name.rpartition(".")[2] in PACKED_PARTS:
            raise ModelLoadError(
                f"{stored.path}: tensor {name!r} is a quantized weight's, but the folder has "
                "neither a quantization_config in config.json nor a quantize_config.json, which "
                "would say how it is packed; add it, or use the unquantized model or a GGUF file"
            )


def _quantized_linears(stored: Checkpoint, form: PackedFormat) -> dict[str, str]:
    """Return the name of each quantized linear, with that of a part by which it is known."""
    found = {}
    for mark in reversed(form.marks):  # the first mark counts
        for name in stored.names():
            linear, _, part = name.rpartition(".")
            if part == mark:
                found[linear] = mark
    return found
