"""`Checkpoint`: a set of named tensors on disk, whatever the format."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minserve.errors import ModelLoadError
from minserve.models.tensor_part import TensorPart
from minserve.progress_bar import progress_bar

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The names by which headers of safetensors, and torch, call dtypes that no weight has as it stands.
_NO_WEIGHTS = {
    *(
        "BOOL",
        "U8",
        "I8",
        "U16",
        "I16",
        "U32",
        "I32",
        "U64",
        "I64",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
    ),
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
}

# What wrappers of a model put before every name: distributed training, torch.compile, PEFT.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "language_model.")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file tells of a tensor without reading it: shape in torch's order, dtype in words."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Misfit:
    """A stored tensor of which a weight is made, and which is missing or not what it must be.

    Attributes:
        weight: the name under which a model reads the weight.
        stored: the name of the stored tensor.
        problem: in words what is wrong with it; ``None`` if it is missing.
    """

    weight: str
    stored: str
    problem: str | None = None


class Checkpoint(ABC):
    """A set of named tensors on disk, read one at a time.

    Names are Hugging Face names with their full prefix (``model.layers.0...``,
    ``model.decoder.layers.0...``, ``lm_head.weight``). This holds even if the file leaves out
    ``model.``, as checkpoints of a bare base model do, or if all names have the prefix of a wrapper.

    Attributes:
        form: the name of the form in which weights are quantized; empty if they are not.
        rounded_to: dtype to which GGUF's quantized weights are rounded as they are unpacked.
        keeps_packed: true if a folder's quantized weights are to be `PackedTensor`s, as far as
            there are kernels for their form.
    """

    form = ""

    def __init__(self, path: Path, files: Mapping[str, Path], *, progress: bool) -> None:
        """``path``: the file or folder to name in errors; ``files``: stored name -> its file."""
        self._path = path
        self._files = dict(files)
        wrapper = _wrapper_of(files)
        bare = {name.removeprefix(wrapper): name for name in files}
        self._stored = {_full_name(name): stored for name, stored in bare.items()}
        # If a file has both spellings of a name, the full name counts.
        self._stored.update({n: stored for n, stored in bare.items() if _full_name(n) == n})
        self._progress = progress
        self._bar: tqdm | None = None
        self.rounded_to = torch.float32
        self.keeps_packed = False

    @property
    def path(self) -> Path:
        """The file or folder of the weights."""
        return self._path

    def files(self) -> list[Path]:
        """Return the files that hold tensors."""
        return sorted(set(self._files.values()))

    def names(self) -> set[str]:
        """Return the names of all tensors. A tied head has no ``lm_head.weight``."""
        return set(self._stored)

    def describe(self, name: str) -> str:
        """Return the file that holds a tensor, for messages; the model's path if none does."""
        return str(self._files.get(self._stored.get(name, name), self._path))

    def get(
        self, name: str, shape: tuple[int, ...] | None = None, part: TensorPart | None = None
    ) -> torch.Tensor:
        """Read one tensor or a part of it, on the CPU, in its stored floating-point dtype.

        GGUF's quantized tensors have the dtype `rounded_to`, those of folders float32.

        ``shape`` is the shape that the model expects of the whole tensor; ``None`` allows any
        shape. The tensor may be a view of the mapped file: copy it, never write to it. ``part``
        needs ``shape``; what is outside of it is not read from the file, as far as its format
        allows that.

        Raises:
            ModelLoadError: naming file and tensor, if the tensor is missing, unreadable, of another
                shape, or not of a floating-point dtype.
        """
        if part is None or shape is None or part.is_whole(shape):
            tensor = self.read(name)
            self._check_shape(name, tensor.shape, shape)
        else:
            self._check_shape(name, self.header(name).shape, shape)
            tensor = self._read_part(*self._place(name), part)
        if tensor.dtype not in WEIGHT_DTYPES:
            where = f"{self.describe(name)}: tensor {name!r}"
            raise ModelLoadError(f"{where} has dtype {tensor.dtype}, which is not a weight's")
        self._advance()
        return tensor

    def _check_shape(self, name: str, found: Sequence[int], wanted: tuple[int, ...] | None) -> None:
        if wanted is not None and tuple(found) != tuple(wanted):
            raise ModelLoadError(
                f"{self.describe(name)}: tensor {name!r} has shape {tuple(found)}, but the model's "
                f"configuration needs {tuple(wanted)}"
            )

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

    def _place(self, name: str) -> tuple[str, Path]:
        """Return a tensor's stored name and its file."""
        if name not in self._stored:
            raise ModelLoadError(f"{self._path}: tensor {name!r} is missing")
        return self._stored[name], self._files[self._stored[name]]

    def num_parameters(self) -> int:
        """Return the number of elements of all tensors, from the files' headers.

        pytorch_model.bin has no header, so it is loaded.
        """
        return sum(
            math.prod(self._header(stored, file).shape) for stored, file in self._files.items()
        )

    def packed_size(self) -> tuple[int, int]:
        """Return how many weights are quantized, and the bytes that they take as they are stored."""
        return 0, 0

    def header(self, name: str) -> TensorHeader:
        """Return a tensor's shape, as `get` would return it, and its stored dtype.

        Raises:
            ModelLoadError: if the tensor is missing, or the file cannot be read.
        """
        return self._header(*self._place(name))

    def misfits(self, names: Iterable[str]) -> list[Misfit]:
        """Return what keeps stored tensors from being read, as far as headers tell.

        Args:
            names: those of the tensors that a model reads; others do not count.
        """
        return [
            Misfit(name, name, f"has dtype {dtype}, which is not a weight's")
            for name in names
            if name in self._stored and (dtype := self.header(name).dtype) in _NO_WEIGHTS
        ]

    @abstractmethod
    def _header(self, stored: str, file: Path) -> TensorHeader:
        """Return what the file tells of a tensor, by its stored name."""

    @abstractmethod
    def _read(self, stored: str, file: Path) -> torch.Tensor:
        """Read a tensor by its stored name from its file."""

    def _read_part(self, stored: str, file: Path, part: TensorPart) -> torch.Tensor:
        """Read a part of a tensor by its stored name from its file.

        Of a mapped file no more than the part is read. Formats whose tensors are computed from the
        file return a copy, which does not keep the whole tensor in memory.
        """
        return part.cut(self._read(stored, file))

    def _advance(self) -> None:
        if self._bar is None:
            self._bar = progress_bar(
                total=len(self._stored),
                desc="Loading weights",
                unit="tensor",
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


def _wrapper_of(names: Iterable[str]) -> str:
    """Return the prefix of wrappers that all names have; empty without one."""
    names, prefix = list(names), ""
    while names and (
        more := next(
            (one for one in _WRAPPERS if all(n.startswith(prefix + one) for n in names)), None
        )
    ):
        prefix += more
    return prefix


def _full_name(stored: str) -> str:
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"
