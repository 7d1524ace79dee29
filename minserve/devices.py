"""Devices that need not be there: published performance models, and those that `minserve profile` wrote.

The coefficients of OPT, ToolLLaMA and Qwen2.5 are those that the authors of SLOs-Serve
(arXiv 2504.08784) give with their public code: seconds per token, per draft step, and the
constant; for Qwen2.5 also per sequence and per token of context. The draft model is OPT-125M.

KV memory is what the cards have left: 90% of their memory, as vLLM takes by default, less the
weights in half precision and 2 GiB for activations, over the bytes of a token's keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minserve.errors import WorkloadError
from minserve.planner.predict.eager import NO_MIXED, MixedLimit
from minserve.planner.predict.perf_model import PerfModel, Piece

GIB = 2**30
MEMORY_SHARE = 0.9
ACTIVATIONS = 2 * GIB
# What the planner's margin starts from where no profile says; it is learned soon.
MARGIN = 1.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A model on the GPUs of one replica.

    Attributes:
        pieces: of the performance model.
        num_gpus: that a replica takes; capacities are per GPU.
        max_model_len: tokens of prompt and output together.
        kv_tokens: that fit in memory beside the weights; ``None`` where nobody knows.
        kv_tokens_drafting: the same where a draft model and its KV are there too.
        kv_bytes: of one token, over all GPUs.
        drafts: whether the profile knows what a draft model costs.
        margin: what the planner's margin starts from.
        mixed: the largest batches with a prefill that are CUDA graphs.
        is_gpu: whether it is known to be a GPU. The file of a profile does not say.
    """

    name: str
    pieces: tuple[Piece, ...]
    num_gpus: int = 1
    max_model_len: int = 2**20
    kv_tokens: int | None = None
    kv_tokens_drafting: int | None = None
    kv_bytes: int = 0
    drafts: bool = False
    margin: float = MARGIN
    mixed: MixedLimit = NO_MIXED
    is_gpu: bool = False

    def perf_model(self) -> PerfModel:
        """A model for one planner to correct online."""
        return PerfModel(self.pieces, margin=self.margin, mixed=self.mixed)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a model: parameters, and bytes of one token's keys and values in half precision."""

    parameters: float
    kv_bytes: int

    @classmethod
    def of(cls, billions: float, num_layers: int, kv_width: int) -> _Shape:
        return cls(billions * 1e9, 2 * 2 * num_layers * kv_width)


_OPT_125M = _Shape.of(0.125, 12, 768)


def _device(
    name: str,
    pieces: tuple[Piece, ...],
    shape: _Shape,
    *,
    gpu_gib: float,
    num_gpus: int = 1,
    max_model_len: int = 2048,
    drafts: bool = False,
) -> Device:
    left = MEMORY_SHARE * gpu_gib * GIB * num_gpus - 2 * shape.parameters - ACTIVATIONS * num_gpus
    with_draft = (left - 2 * _OPT_125M.parameters) / (shape.kv_bytes + _OPT_125M.kv_bytes)
    return Device(
        name=name,
        pieces=pieces,
        num_gpus=num_gpus,
        max_model_len=max_model_len,
        kv_tokens=int(left / shape.kv_bytes),
        kv_tokens_drafting=int(with_draft) if drafts else None,
        kv_bytes=shape.kv_bytes,
        drafts=drafts,
        is_gpu=True,
    )


_PUBLISHED = (
    _device(
        "opt-6.7b-a100",
        (
            Piece(tokens=6.878e-5, draft_steps=1.25e-6, base=0.02480),
            Piece(tokens=7.523e-5, draft_steps=3.465e-3, base=0.003033),
        ),
        _Shape.of(6.7, 32, 4096),
        gpu_gib=40,
        drafts=True,
    ),
    _device(
        "opt-13b-2xa100",
        (Piece(tokens=7.213e-5, draft_steps=3.341e-3, base=0.03173),),
        _Shape.of(13, 40, 5120),
        gpu_gib=40,
        num_gpus=2,
        drafts=True,
    ),
    _device(
        "opt-30b-4xa100",
        (Piece(tokens=9.314e-5, draft_steps=2.797e-3, base=0.03788),),
        _Shape.of(30, 48, 7168),
        gpu_gib=40,
        num_gpus=4,
        drafts=True,
    ),
    _device(
        "toolllama-7b-a100",
        (Piece(tokens=6.572e-5, base=0.02752),),
        _Shape.of(6.7, 32, 4096),
        gpu_gib=40,
        max_model_len=4096,
    ),
    _device(
        "opt-13b-h100",
        (Piece(tokens=4.177e-5, base=0.02743),),
        _Shape.of(13, 40, 5120),
        gpu_gib=80,
    ),
    _device(
        "qwen2.5-7b-a100",
        (Piece(tokens=5.1e-5, seqs=1.69e-5, context_tokens=8e-8, base=0.014),),
        _Shape.of(7.6, 28, 512),
        gpu_gib=40,
        max_model_len=32768,
    ),
)
PUBLISHED: Mapping[str, Device] = {device.name: device for device in _PUBLISHED}


def find_device(name: str) -> Device:
    """A published device by name, or the one of a profile's file.

    Raises:
        WorkloadError: where it is neither.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(PUBLISHED)
        raise WorkloadError(
            f"{name!r} is neither a file that `minserve profile` wrote nor one of {known}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model = PerfModel.from_dict(values["model"])
        return Device(
            name=str(values["key"]["model"]),
            pieces=model.pieces,
            drafts=_drafts(model),
            margin=model.margin,
            mixed=model.mixed,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WorkloadError(
            f"{name} is not a profile ({type(error).__name__}: {error}); "
            "`minserve profile --json` tells where the profiles are kept"
        ) from None


def _drafts(model: PerfModel) -> bool:
    return any(piece.draft_steps or piece.draft_tokens for piece in model.pieces)
