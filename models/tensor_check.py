"""`check_tensors`: compare what a model reads with what its files hold, before any weight is read.

The model's own class is built from tensors without memory (torch's ``meta`` device), and what it
asks for is recorded. So a family's code says only once which tensors it has.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minserve.errors import ModelLoadError
from minserve.models.base import ModelShape
from minserve.models.config import ModelConfig
from minserve.models.layers import Linear, WeightFormat, WeightPlacement
from minserve.models.ranks import ALONE, Ranks
from minserve.models.registry import build_model
from minserve.models.tensor_part import TensorPart
from minserve.models.weights.checkpoint import Checkpoint, Misfit

META = torch.device("meta")
# Tables that follow from the configuration, which some programs save with the weights.
_COMPUTED = re.compile(
    r".*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.bias|attn\.masked_bias|masked_bias)"
)
# What would do something in the model: tensors of layers, and biases anywhere.
_NEEDED = re.compile(r"(^|\.)layers\.\d+\.|\.bias$")
# Scales of a quantized KV cache, which is kept unquantized here.
_KV_SCALE = re.compile(r"\.[kv]_scale$")
_MOST_NAMED = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WrongShape:
    """A tensor whose shape is not that which the configuration demands."""

    name: str
    found: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What the files of a model lack, and what they hold that nothing reads.

    Attributes:
        wanted: shapes of all tensors, or of their parts, that the model reads, by name.
        missing: names of tensors that it reads and that are not there.
        wrong_shape: tensors that are there with another shape.
        misfits: stored tensors that are missing or wrong for the weights that are made of them.
        form: the form in which weights are quantized; empty if they are not.
        unread: names of tensors that are there and that it does not read, without tables that
            follow from the configuration, biases of zeros, and a head that is tied to the
            embeddings.
        shape: the numbers of the model that the engine needs.
        num_linear: number of elements of the weights of linear layers, a tied head included.
        num_embedding: number of elements of the tokens' embeddings.
    """

    wanted: dict[str, tuple[int, ...]]
    missing: Sequence[str]
    wrong_shape: Sequence[WrongShape]
    misfits: Sequence[Misfit]
    form: str
    unread: Sequence[str]
    shape: ModelShape
    num_linear: int
    num_embedding: int

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors that the model reads."""
        return sum(math.prod(shape) for shape in self.wanted.values())

    @property
    def is_complete(self) -> bool:
        """True if the model can be read."""
        return not self.missing and not self.wrong_shape and not self.misfits

    def problem(self) -> str:
        """Return in words what is wrong: first names and numbers; empty if nothing is."""
        parts = []
        if self.missing:
            named = _some([repr(name) for name in self.missing])
            parts.append(f"{_count(len(self.missing), 'tensor')} missing ({named})")
        if self.wrong_shape:
            named = _some([f"{w.name!r} {w.found}, not {w.wanted}" for w in self.wrong_shape])
            parts.append(f"{_count(len(self.wrong_shape), 'tensor')} of another shape ({named})")
        lost = [repr(one.stored) for one in self.misfits if one.problem is None]
        what = f"of {self.form} weights " if self.form else ""
        if lost:
            be = "are" if len(lost) > 1 else "is"
            parts.append(
                f"{_count(len(lost), 'tensor')} {what}{be} missing ({_some(lost)}): the download "
                "may be incomplete"
            )
        wrong = [f"{one.stored!r} {one.problem}" for one in self.misfits if one.problem]
        if wrong:
            parts.append(f"{_count(len(wrong), 'tensor')} {what}cannot be read ({_some(wrong)})")
        if parts and self.unread:
            named = _some([repr(name) for name in self.unread])
            parts.append(f"{_count(len(self.unread), 'tensor')} not known to the model ({named})")
        return "; ".join(parts)


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> TensorReport:
    """Compare the tensors that a model reads with those of a checkpoint, by names and shapes.

    Only headers of files are read, which takes milliseconds.

    Raises:
        ModelLoadError: if a header cannot be read, or the configuration makes no model.
    """
    names = checkpoint.names()
    asked = _ask(names, config, ALONE)
    misfits = checkpoint.misfits(asked.wanted)
    broken = {one.weight for one in misfits}
    missing, wrong = [], []
    for name, wanted in asked.wanted.items():
        if name not in names:
            missing.append(name)
        elif name not in broken and (found := tuple(checkpoint.header(name).shape)) != wanted:
            wrong.append(WrongShape(name, found, wanted))
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
    unread = names - asked.wanted.keys() - tied
    return TensorReport(
        **asked._asdict(),
        missing=missing,
        wrong_shape=wrong,
        misfits=misfits,
        form=checkpoint.form,
        unread=sorted(
            name
            for name in unread
            if not _COMPUTED.fullmatch(name) and not _is_zero_bias(checkpoint, name)
        ),
    )


def share_of(report: TensorReport, config: ModelConfig, ranks: Ranks) -> TensorReport:
    """Return the report of a model with the sizes of one rank's share of it.

    Raises:
        ConfigError: if the model cannot be divided among so many ranks.
    """
    return replace(report, **_ask(set(report.wanted), config, ranks)._asdict())


class _Asked(NamedTuple):
    """What a model asks of its files, as `TensorReport` has it."""

    wanted: dict[str, tuple[int, ...]]
    shape: ModelShape
    num_linear: int
    num_embedding: int


def _ask(names: set[str], config: ModelConfig, ranks: Ranks) -> _Asked:
    placement = _CountingPlacement(META, torch.float32, torch.float32, WeightFormat.DENSE)
    recorder = _WantedTensors(names)
    with _WithoutMemory():
        # One position, for tables of positions take time and no tensor depends on their length.
        model = build_model(recorder, config, placement, max_positions=1, ranks=ranks)
    return _Asked(
        wanted=recorder.wanted,
        shape=replace(model.shape, max_positions=config.max_positions),
        num_linear=sum(placement.linears),
        num_embedding=model.embed.table.numel(),
    )


def require_tensors(checkpoint: Checkpoint, config: ModelConfig) -> TensorReport:
    """Do as `check_tensors`, for a model that is to be read; names in the log what is left unread.

    Raises:
        ModelLoadError: as `refuse_misfits` does.
    """
    report = check_tensors(checkpoint, config)
    refuse_misfits(checkpoint, report)
    if report.unread:
        log.warning("%s: %s", checkpoint.path, unread_words(report))
    return report


def refuse_misfits(checkpoint: Checkpoint, report: TensorReport) -> None:
    """Refuse a checkpoint that is not the model that its configuration describes.

    Raises:
        ModelLoadError: naming tensors that are missing or of another shape, the first few and how
            many; or tensors of layers and biases that nothing would read, for they do something in
            the model that the file holds.
    """
    if not report.is_complete:
        raise ModelLoadError(
            f"{checkpoint.path}: the weights do not fit the model's configuration: "
            f"{report.problem()}{_hint(report)}"
        )
    unread = [name for name in report.unread if _NEEDED.search(name) and not _KV_SCALE.search(name)]
    if unread:
        raise ModelLoadError(
            f"{checkpoint.path}: {_count(len(unread), 'tensor')} of the model would not be read "
            f"({_some([repr(name) for name in unread])}), so the model would not be what its file "
            "says; see whether config.json is that of this model, with all its entries"
        )


def unread_words(report: TensorReport) -> str:
    """Return in words which tensors are not read."""
    names = _some([repr(name) for name in report.unread])
    return f"{_count(len(report.unread), 'tensor')} not known to the model, and not read ({names})"


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor is a bias of zeros, as GPTQ's tools leave them in every linear."""
    return name.endswith(".bias") and not checkpoint.read(name).any()


def _hint(report: TensorReport) -> str:
    """Return what the names of tensors tell of a checkpoint that does not fit."""
    marks = ("vision", "visual", "image", "audio", "multi_modal", "mm_projector")
    if any(mark in name for name in report.unread for mark in marks):
        return "; the names are those of a multimodal model, and only text models are run"
    if [*report.missing] == ["lm_head.weight"]:
        return (
            "; a model without a head generates no text: it may be one for embeddings, or "
            "tie_word_embeddings in config.json should be true"
        )
    if report.wrong_shape and not report.missing:
        return "; the config.json may be that of another model, or of another size of it"
    return ""


class _WantedTensors:
    """A source of tensors without memory that notes what is asked of it."""

    def __init__(self, names: set[str]) -> None:
        self.wanted: dict[str, tuple[int, ...]] = {}
        self._names = names

    def names(self) -> set[str]:
        return self._names

    def get(self, name: str, shape: tuple[int, ...], part: TensorPart | None = None) -> Tensor:
        own = list(shape)
        if part is not None:
            own[part.dim] = part.length
        self.wanted[name] = tuple(own)
        return torch.empty(own, device=META)


class _WithoutMemory(TorchFunctionMode):
    """Answers by itself how joined, scaled and shifted tensors without memory look.

    torch would import its compiler for that, which takes a second or two.
    """

    _ELEMENTWISE = frozenset(
        f"{form}" for verb in ("add", "mul", "div", "sub") for form in (verb, f"__{verb}__")
    ) | {"__truediv__", "__rmul__", "__radd__"}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if func is torch.equal:
            return True  # a tied head that is stored as well counts as the same
        if func is torch.cat and first[0].is_meta:
            return self._cat(*args, **kwargs)
        if (
            isinstance(first, Tensor)
            and first.is_meta
            and getattr(func, "__name__", "") in self._ELEMENTWISE
        ):
            return first.new_empty(first.shape)
        return func(*args, **kwargs)

    @staticmethod
    def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        shape = list(tensors[0].shape)
        shape[dim] = sum(one.shape[dim] for one in tensors)
        return tensors[0].new_empty(shape)


@dataclass(frozen=True)
class _CountingPlacement(WeightPlacement):
    """Plain weights, of which the sizes of those of linear layers are noted."""

    linears: list[int] = field(default_factory=list)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        self.linears.append(weight.numel())
        return super().linear(weight, bias)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
