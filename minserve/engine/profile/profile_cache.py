"""Keeps profiles on disk, one JSON file per `ProfileKey`, under the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from minserve.cpu_name import cpu_name
from minserve.engine.core import EngineCore
from minserve.engine.device.runner import ModelRunner, model_runner
from minserve.machine import Machine
from minserve.planner.predict.perf_fit import FitQuality, ProfileSample, undisturbed
from minserve.planner.predict.perf_model import BatchShape, PerfModel

log = logging.getLogger(__name__)

# Below this R2 on held-out shapes a profile is poor; fewer shapes than that cannot tell.
POOR_R2 = 0.8
LEAST_HELD_OUT = 5
# Seconds between two looks of a process that waits for a profile.
POLL_S = 0.05
# Files of another format are measured anew.
FORMAT = 4


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """The model, device and settings that a profile holds for.

    Attributes:
        model: its name, family and shape.
        device: the CPU's or GPU's product name; of a group of ranks their number and the name.
        dtype: the dtype of linear weights, and that of activations where they differ.
        threads: the number of threads on the CPU.
        attention: the backend, and which passes are CUDA graphs.
    """

    model: str
    device: str
    dtype: str
    threads: int
    attention: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """A measured batch, and its time as predicted by a fit that never saw its shape."""

    shape: BatchShape
    measured_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One device's measured speed with one model.

    Attributes:
        torch: the version of torch.
        model: the model fitted to all samples.
        quality: how well a fit to the other shapes predicts the held-out shapes.
        held_out: the held-out shapes.
        runs: the seconds of every repeat of every shape.
        measured_at: the time of the last of them, ISO 8601, UTC.
        seconds: the time that all measuring took.
        allowed_s: the time that a start allowed for it; a rough profile was allowed little.
    """

    key: ProfileKey
    torch: str
    model: PerfModel
    quality: FitQuality
    held_out: tuple[Prediction, ...]
    runs: Mapping[BatchShape, tuple[float, ...]]
    measured_at: str
    seconds: float
    allowed_s: float

    @property
    def samples(self) -> list[ProfileSample]:
        """Every shape with the mean of its undisturbed repeats."""
        return [ProfileSample(shape, undisturbed(runs)) for shape, runs in self.runs.items()]

    @property
    def is_poor(self) -> bool:
        """True where the times are hard to predict, as on a machine that was busy."""
        return self.quality.r2 < POOR_R2 and self.quality.num_samples >= LEAST_HELD_OUT

    def new_model(self) -> PerfModel:
        """Return a copy of the model, which one planner may correct online."""
        return PerfModel(self.model.pieces, margin=self.model.margin, mixed=self.model.mixed)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return {
            "format": FORMAT,
            "key": asdict(self.key),
            "torch": self.torch,
            "model": self.model.to_dict(),
            "quality": asdict(self.quality),
            "held_out": [[*astuple(p.shape), p.measured_s, p.predicted_s] for p in self.held_out],
            "runs": [[*astuple(shape), list(runs)] for shape, runs in self.runs.items()],
            "measured_at": self.measured_at,
            "seconds": self.seconds,
            "allowed_s": self.allowed_s,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        """Return a profile from what `to_dict` returned.

        Raises:
            ValueError, TypeError, KeyError: where it is not a profile, or has another format.
        """
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, not {FORMAT}")
        return cls(
            key=ProfileKey(**values["key"]),
            torch=str(values["torch"]),
            model=PerfModel.from_dict(values["model"]),
            quality=FitQuality(**{name: +value for name, value in values["quality"].items()}),
            held_out=tuple(Prediction(_shape(s), m, p) for *s, m, p in values["held_out"]),
            runs={_shape(shape): _seconds(runs) for *shape, runs in values["runs"]},
            measured_at=str(values["measured_at"]),
            seconds=float(values["seconds"]),
            allowed_s=float(values["allowed_s"]),
        )


def profile_key(core: EngineCore, model_name: str) -> ProfileKey:
    """Return the key of a loaded model on its device.

    Names alone do not tell models apart, so family and shape are part of it.
    """
    runner = model_runner(core.runner)
    shape = runner.model.shape
    family = type(runner.model).__name__
    numbers = (
        f"{shape.num_layers}x{shape.hidden_size}, {shape.num_heads}/{shape.num_kv_heads} heads of "
        f"{shape.head_dim}, vocabulary {shape.vocab_size}"
    )
    return ProfileKey(
        model=f"{model_name} ({family} {numbers})",
        device=_group_name(runner),
        dtype=_dtypes(runner),
        threads=torch.get_num_threads() if runner.threads is None else runner.threads.most,
        attention=runner.backend.name + _graph_words(runner),
    )


def _graph_words(runner: ModelRunner) -> str:
    if runner.graphs is None:
        return ""
    tokens, chunks = runner.graphs.mixed
    more = f" and of up to {tokens} tokens with {chunks} chunks" if tokens else ""
    return f", CUDA graphs of decodes{more}"


def profile_path(key: ProfileKey) -> Path:
    """Return the file in which the key's profile is kept, whether it exists or not.

    Raises:
        FileNotFoundError: where there is no folder to keep it in.
    """
    text = json.dumps(asdict(key), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    words = f"{key.model.split(' (')[0]} {key.device} {key.dtype} {key.threads}t"
    slug = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-.")[:80]
    return _cache_folder() / "minserve" / "profiles" / f"{slug}-{digest}.json"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME") from None


def load(key: ProfileKey) -> Profile | None:
    """Return the kept profile, or ``None``; an unusable file is warned of."""
    try:
        path = profile_path(key)
        profile = Profile.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever may be in the file: a start must not depend on it
        log.warning("ignoring the profile %s: %s: %s", path, type(error).__name__, error)
        return None
    if profile.key != key:
        log.warning("ignoring the profile %s: it is of %s", path, profile.key)
        return None
    return profile


def save(profile: Profile) -> Path:
    """Keep a profile in place of the key's older one. Readers see one of the two, whole.

    Raises:
        OSError: where the folder cannot be written.
    """
    path = profile_path(profile.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(profile.to_dict(), file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@contextmanager
def alone_with(key: ProfileKey, wait_s: float) -> Iterator[bool]:
    """Keep other processes from measuring for the same key, which would disturb both.

    Args:
        wait_s: how long to wait for another process to end its measuring.

    Yields:
        True where the caller is alone, or no lock can be taken in the folder.
    """
    try:
        path = profile_path(key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield True
        return
    try:
        yield _lock(file, time.monotonic() + wait_s)
    finally:
        os.close(file)  # which lets go


def _lock(file: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        except OSError:  # a file system without locks
            return True
        else:
            return True


def _shape(numbers: Any) -> BatchShape:
    """Return the shape of a batch in a file, checked.

    Raises:
        ValueError, TypeError: where it is none.
    """
    if not all(isinstance(each, int) and 0 <= each < 2**53 for each in numbers):
        raise ValueError(f"{numbers!r} is no shape of a batch")
    return BatchShape(*numbers)


def _seconds(runs: Any) -> tuple[float, ...]:
    """Return the runs in a file, checked.

    Raises:
        ValueError, TypeError: where they are not seconds of runs.
    """
    seconds = tuple(map(float, runs))
    if not seconds or not all(0.0 < each < float("inf") for each in seconds):
        raise ValueError(f"{runs!r} are no seconds of runs")
    return seconds


def _group_name(runner: ModelRunner) -> str:
    name = _device_name(runner.device)
    return name if runner.company is None else f"{runner.company.size} ranks on {name}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    quota = Machine.look().cpu_quota
    # Threads that a container does not let run all the time are slower than so many cores.
    slowed = quota is not None and quota < torch.get_num_threads()
    return f"{cpu_name()} limited to {quota:g} CPUs" if slowed else cpu_name()


def _dtypes(runner: ModelRunner) -> str:
    """Return the words for the dtypes of weights and arithmetic.

    They name a second form of the weights too, for which there may be room at one start and
    not at another.
    """
    kv = runner.kv[0]
    words = dtype_words(runner.model.linear_dtype, kv.dtype)
    if runner.model.packed_form:
        words = f"{runner.model.packed_form} in {words}"
    if runner.model.placement.has_two_forms:
        words = f"{words} and float16"
    return words if kv.scales is None else f"{words}, KV in {_name(kv.key.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_words(weights: torch.dtype, arithmetic: torch.dtype) -> str:
    """Return the words for two dtypes, such as ``bfloat16``, or ``bfloat16 in float32``."""
    stored, computed = _name(weights), _name(arithmetic)
    return stored if stored == computed else f"{stored} in {computed}"
