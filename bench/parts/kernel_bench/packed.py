"""Linears on packed weights in `kernel_bench.py`, beside cuBLAS on the same weights in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.packed_matrix import LEAST_OUTPUTS, PackedMatrix, ValueKind, packed_group
from shared.kernel_cases import OURS, Contestant, KernelSetting, Problem, Scale
from shared.synthetic_models import SHAPES

KERNEL = "packed_linear"
MODELS = {
    Scale.FULL: ("llama-3.1-8b",),
    Scale.QUICK: ("llama-3.1-8b",),
    Scale.DRY: ("tiny-llama",),
}
ROWS = {Scale.FULL: (1, 8, 64, 256, 1024), Scale.QUICK: (1, 16, 256), Scale.DRY: (1, 3)}


class Packing(NamedTuple):
    """How weights are quantized.

    Attributes:
        group: inputs of a group; ``None`` for one group, which is one scale for an output.
    """

    kind: ValueKind
    group: int | None
    zeros: bool


FORMS = {
    "int4 g128": Packing(ValueKind.INT4, 128, zeros=True),
    "int4 g32": Packing(ValueKind.INT4, 32, zeros=True),
    "int4 g64 symmetric": Packing(ValueKind.INT4, 64, zeros=False),
    "fp8 channel": Packing(ValueKind.FP8, None, zeros=False),
    "fp8 block": Packing(ValueKind.FP8, 128, zeros=False),
    "int8 channel": Packing(ValueKind.INT8, None, zeros=False),
}
SWEPT = {
    Scale.FULL: ("int4 g128", "fp8 channel", "fp8 block"),
    Scale.QUICK: ("int4 g128", "fp8 channel"),
    Scale.DRY: ("int4 g32", "fp8 channel"),
}


def packed_problems(scale: Scale) -> list[partial[Problem]]:
    """Return problems with the linears of an MLP: the widest, and the one with most inputs."""
    return [
        partial(packed_problem, model, linear, rows, form)
        for model in MODELS[scale]
        for form in SWEPT[scale]
        for linear in ("gate_up", "down")
        for rows in ROWS[scale]
    ]


def packed_problem(
    model: str, linear: str, rows: int, form: str, setting: KernelSetting
) -> Problem:
    """Return a linear of a model on random packed weights, with another matrix for each run."""
    hidden, width = SHAPES[model]["hidden_size"], SHAPES[model]["intermediate_size"]
    inputs, outputs = (hidden, 2 * width) if linear == "gate_up" else (width, hidden)
    first = random_matrix(outputs, inputs, FORMS[form], setting)
    least_bytes = first.num_bytes + rows * (inputs + outputs) * setting.dtype.itemsize
    num_sets = setting.num_sets(least_bytes)
    x = setting.randn(rows, inputs)

    def ours() -> Contestant:
        from minserve.kernels.packed_linear import packed_linear

        copies = [replace(first, words=first.words.clone()) for _ in range(num_sets - 1)]
        return _runs(partial(packed_linear, x), [first, *copies])

    def unpacked() -> Contestant:
        weight = weight_of(first).to(setting.dtype)
        copies = [weight.clone() for _ in range(setting.num_sets(weight.nbytes) - 1)]
        return _runs(partial(F.linear, x), [weight, *copies])

    return Problem(
        kernel=KERNEL,
        case={"model": model, "linear": linear, "form": form, "rows": rows},
        dtype=setting.dtype,
        least_bytes=least_bytes,
        flops=2 * rows * inputs * outputs,
        memory=num_sets * least_bytes + 12 * inputs * outputs,
        expected=lambda: x.float() @ weight_of(first).t(),
        contestants={OURS: ours, "cublas": unpacked},
    )


def _runs(form: Callable[..., Tensor], weights: list) -> Contestant:
    runs = [lambda one=one: form(one) for one in weights]
    return Contestant(runs, runs[0])


def random_matrix(
    outputs: int, inputs: int, packing: Packing, setting: KernelSetting
) -> PackedMatrix:
    """Return a matrix of random words; its products have values around one."""
    kind, size, zeros = packing
    kept = packed_group(inputs if size is None else size, kind)
    assert kept is not None, (inputs, packing)
    height = kept[1]
    chunk = height * 32 // kind.bits
    padded = math.ceil(inputs / chunk) * chunk
    group = padded if size is None else size
    shape, groups = (padded * kind.bits // 32, outputs), math.ceil(padded / group)

    def octets(rows: int) -> Tensor:
        if not setting.filled:
            return torch.empty(rows, outputs, dtype=torch.uint8, device=setting.device)
        most = 128 if kind is ValueKind.INT8 else 1 << min(kind.bits, 7)
        # Floats of 8 bits below the NaN, of both signs.
        drawn = torch.randint(0, most - 1, (rows, outputs), device=setting.device)
        return drawn.to(torch.uint8)

    words = octets(4 * shape[0]).view(shape[0], 4 * outputs).view(torch.int32)
    typical = {ValueKind.INT4: 6.5, ValueKind.INT8: 80.0, ValueKind.FP8: 80.0}[kind]
    scale = setting.randn(groups, outputs).float().abs() / (typical * inputs**0.5)
    return PackedMatrix(
        words=words,
        scale=scale.to(torch.float16),
        zero=octets(groups) & 15 if zeros else None,
        order=None,
        arrived=torch.zeros(
            math.ceil(outputs / LEAST_OUTPUTS), dtype=torch.int32, device=setting.device
        ),
        num_inputs=inputs,
        group=group,
        height=height,
        kind=kind,
    )


def weight_of(matrix: PackedMatrix) -> Tensor:
    """Return what a matrix stands for, float32 ``[out, in]``, by plain operations."""
    bits, height, per_word = matrix.kind.bits, matrix.height, matrix.per_word
    chunks = matrix.words.view(-1, height, matrix.num_outputs)
    slots = [(chunks >> (bits * i)) & ((1 << bits) - 1) for i in range(per_word)]
    values = torch.stack(slots, 1).reshape(-1, matrix.num_outputs)[: matrix.num_inputs]
    if matrix.kind is ValueKind.FP8:
        numbers = values.to(torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        numbers = values.float()
    group = torch.arange(matrix.num_inputs, device=values.device) // matrix.group
    zero = matrix.kind.middle if matrix.zero is None else matrix.zero.float()[group]
    return ((numbers - zero) * matrix.scale.float()[group]).t()
