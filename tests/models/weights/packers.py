"""Quantized linears, packed value by value from the definitions of the formats.

It shares no code with minserve: values are put into words by loops over bits, and the weight that
a linear stands for is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Position in a word of AWQ, from the lowest bits -> output within the word.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Linear:
    """Stored tensors by the last part of their names, and the weight that they stand for."""

    stored: dict[str, Tensor]
    weight: Tensor


@dataclass
class Form:
    """A way to store linears: its settings in config.json, and what packs one."""

    settings: dict[str, Any]
    make: Callable[[int, int, torch.Generator], Linear]


def words(values: list[int], bits: int) -> list[int]:
    """Return values in 32-bit words (as signed numbers), one after the other from the lowest
    bit.
    """
    packed = [0] * -(-len(values) * bits // 32)
    for i, value in enumerate(values):
        packed[i * bits // 32] |= value << (i * bits % 32)
    return [word - 2**32 if word >= 2**31 else word for word in packed]


def pack_rows(values: Tensor, bits: int) -> Tensor:
    return torch.tensor([words(row, bits) for row in values.tolist()], dtype=torch.int32)


def pack_awq(values: Tensor) -> Tensor:
    """``values``: ``[n, outputs]``."""
    shuffled = [
        [row[start + output] for start in range(0, len(row), 8) for output in AWQ_ORDER]
        for row in values.tolist()
    ]
    return pack_rows(torch.tensor(shuffled), 4)


def e4m3(octet: int) -> float:
    """Return the number that an 8 bit float of 4 bits of exponent and 3 of mantissa stands for."""
    sign, exponent, mantissa = octet >> 7, octet >> 3 & 15, octet & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def exact(values: Tensor, zero: Tensor, scale: Tensor, row: list[int], col: list[int]) -> Tensor:
    """Return ``(values - zero) * scale``, rounded once to float32.

    ``row`` and ``col`` say which row and column of ``zero`` and ``scale`` a row and a column of the
    weight have.
    """
    zeros, scales = zero.double()[row][:, col], scale.double()[row][:, col]
    return ((values.double() - zeros) * scales).float()


def integers(rng: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Return random integers from low to high, both among them."""
    return torch.randint(low, high + 1, shape, generator=rng)


def scales(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return (0.01 + 0.02 * torch.rand(shape, generator=rng)).to(dtype)


def columns(rng: torch.Generator, cols: int, size: int, shuffled: bool) -> list[int]:
    """Return the group of each column."""
    groups = [i // size for i in range(cols)]
    order = torch.randperm(cols, generator=rng).tolist() if shuffled else range(cols)
    return [groups[i] for i in order]


def gptq(
    bits: int,
    group_size: int,
    *,
    act_order: bool = False,
    version: str = "gptq",
    with_index: bool = True,
) -> Form:
    def make(rows: int, cols: int, rng: torch.Generator) -> Linear:
        size = cols if group_size == -1 else group_size
        col = columns(rng, cols, size, act_order)
        groups, top = max(col) + 1, 2**bits - 1
        less = 1 if version == "gptq" else 0
        value = integers(rng, 0, top, rows, cols)
        zero = integers(rng, less, top, rows, groups)
        scale = scales(rng, torch.float16, rows, groups)
        stored = {
            "qweight": pack_rows(value, bits).t(),
            "qzeros": pack_rows((zero - less).t(), bits),
            "scales": scale.t(),
        }
        if with_index:
            stored["g_idx"] = torch.tensor(col, dtype=torch.int32)
        return Linear(stored, exact(value, zero, scale, list(range(rows)), col))

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": False,
        "checkpoint_format": version,
    }
    return Form(settings, make)


def awq(group_size: int, version: str = "gemm") -> Form:
    def make(rows: int, cols: int, rng: torch.Generator) -> Linear:
        size = cols if group_size == -1 else group_size
        col = columns(rng, cols, size, False)
        groups = max(col) + 1
        value, zero = integers(rng, 0, 15, rows, cols), integers(rng, 0, 15, rows, groups)
        scale = scales(rng, torch.float16, rows, groups)
        if version == "gemm":
            stored = {
                "qweight": pack_awq(value.t()),
                "qzeros": pack_awq(zero.t()),
                "scales": scale.t(),
            }
        else:
            packed = pack_rows(zero, 4)
            padded = torch.zeros(rows, packed.shape[1] * 8, dtype=torch.float16)
            padded[:, :groups] = scale
            stored = {"qweight": pack_rows(value, 4), "qzeros": packed, "scales": padded}
        return Linear(stored, exact(value, zero, scale, list(range(rows)), col))

    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": version}
    return Form(settings, make)


def fp8(block: list[int] | None, scale_of: str, *, method: str = "fp8") -> Form:
    def make(rows: int, cols: int, rng: torch.Generator) -> Linear:
        value, bits = floats(rng, rows, cols)
        scale, row, col = scale_grid(rng, rows, cols, scale_of, block, torch.float32)
        part = "weight_scale_inv" if block else "weight_scale"
        stored = {"weight": bits, part: scale[0, 0] if scale_of == "tensor" else scale}
        return Linear(stored, exact(value, torch.zeros_like(scale), scale, row, col))

    settings: dict[str, Any] = {"quant_method": method, "activation_scheme": "dynamic"}
    if block:
        settings["weight_block_size"] = block
    return Form(settings, make)


def floats(rng: torch.Generator, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Return random 8 bit floats, as float64 and as stored; none is the NaN (all bits 1)."""
    octets = integers(rng, 0, 126, rows, cols) + 128 * integers(rng, 0, 1, rows, cols)
    table = torch.tensor([e4m3(octet) for octet in range(256)], dtype=torch.float64)
    return table[octets], octets.to(torch.uint8).view(torch.float8_e4m3fn)


def scale_grid(
    rng: torch.Generator,
    rows: int,
    cols: int,
    scale_of: str,
    block: list[int] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, list[int], list[int]]:
    """Return scales, and which row and column of them each row and column of the weight has."""
    high = {"tensor": rows, "channel": 1, "group": 1, "block": block[0] if block else 0}[scale_of]
    wide = block[1] if block else cols
    row, col = [i // high for i in range(rows)], [i // wide for i in range(cols)]
    return scales(rng, dtype, max(row) + 1, max(col) + 1), row, col


def compressed(
    form: str,
    scale_of: str,
    *,
    bits: int = 8,
    kind: str = "int",
    block: list[int] | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    activations: bool = False,
) -> Form:
    """compressed-tensors; ``block``: outputs and inputs with one scale, ``[1, n]`` for a group."""

    def make(rows: int, cols: int, rng: torch.Generator) -> Linear:
        scale, row, col = scale_grid(rng, rows, cols, scale_of, block, torch.bfloat16)
        half = 2 ** (bits - 1)
        stored = {"weight_scale": scale}
        if kind == "float":
            value, stored["weight"] = floats(rng, rows, cols)
        else:
            value = integers(rng, -half, half - 1, rows, cols)
            if form == "pack-quantized":
                stored["weight_packed"] = pack_rows(value + half, bits)
                stored["weight_shape"] = torch.tensor([rows, cols])
            else:
                stored["weight"] = value.to(torch.int8)
        zero = torch.zeros(scale.shape)
        if not symmetric:
            zero = integers(rng, -half, half - 1, *scale.shape)
            packed = form == "pack-quantized" and scale_of != "tensor"
            stored["weight_zero_point"] = (
                pack_rows((zero + half).t(), bits).t() if packed else zero.to(torch.int8)
            )
        if act_order:
            col = columns(rng, cols, block[1] if block else cols, True)
            stored["weight_g_idx"] = torch.tensor(col, dtype=torch.int32)
        return Linear(stored, exact(value, zero, scale, row, col))

    weights = {"num_bits": bits, "type": kind, "strategy": scale_of, "symmetric": symmetric}
    if scale_of == "group" and block:
        weights |= {"group_size": block[1], "actorder": "group" if act_order else None}
    if scale_of == "block":
        weights["block_structure"] = block
    group = {"targets": ["Linear"], "weights": weights}
    if activations:
        group["input_activations"] = {"num_bits": 8, "type": kind, "dynamic": True}
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return Form(settings, make)


FORMS = {
    "gptq-4": gptq(4, 32),
    "gptq-4-act-order": gptq(4, 16, act_order=True),
    "gptq-4-ragged-groups": gptq(4, 48),
    "gptq-8-one-group": gptq(8, -1),
    "gptq-2-no-index": gptq(2, 32, with_index=False),
    "gptq-v2": gptq(4, 32, act_order=True, version="gptq_v2"),
    "awq-gemm": awq(32),
    "awq-one-group": awq(-1),
    "awq-gemv": awq(16, "gemv"),
    "fp8-tensor": fp8(None, "tensor"),
    "fp8-channel": fp8(None, "channel", method="fbgemm_fp8"),
    "fp8-block": fp8([24, 40], "block"),
    "ct-pack-4-group": compressed("pack-quantized", "group", bits=4, block=[1, 32]),
    "ct-pack-4-asymmetric": compressed(
        "pack-quantized", "group", bits=4, block=[1, 16], symmetric=False
    ),
    "ct-pack-4-act-order": compressed(
        "pack-quantized", "group", bits=4, block=[1, 16], symmetric=False, act_order=True
    ),
    "ct-pack-8-channel": compressed("pack-quantized", "channel"),
    "ct-pack-4-channel-asymmetric": compressed(
        "pack-quantized", "channel", bits=4, symmetric=False
    ),
    "ct-pack-2-tensor": compressed("pack-quantized", "tensor", bits=2, symmetric=False),
    "ct-int-channel": compressed("int-quantized", "channel", activations=True),
    "ct-int-asymmetric": compressed("int-quantized", "channel", symmetric=False, activations=True),
    "ct-naive-tensor": compressed("naive-quantized", "tensor"),
    "ct-float-tensor": compressed("float-quantized", "tensor", kind="float", activations=True),
    "ct-float-channel": compressed("float-quantized", "channel", kind="float"),
    "ct-float-block": compressed("float-quantized", "block", kind="float", block=[48, 40]),
}
