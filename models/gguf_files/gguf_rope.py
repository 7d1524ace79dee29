"""`gguf_rope`: the RoPE settings of a GGUF file under transformers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.gguf_files.gguf_model import GGUFModel

# Architectures whose RoPE may turn a part of each head alone.
_PARTIAL = ("phi3",)
_LLAMA3 = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_TYPE, _FACTOR = "rope.scaling.type", "rope.scaling.factor"
_ORIGINAL = "rope.scaling.original_context_length"
_ATTENTION = "rope.scaling.attn_factor"


def gguf_rope(gguf: GGUFModel, head_dim: int) -> dict[str, Any]:
    """Return the entry ``rope_parameters`` of a config.json.

    What the keys mean is defined by how llama.cpp reads them (src/llama-model.cpp) and how its
    converter writes them.

    Raises:
        UnsupportedModelError: for RoPE that minserve cannot reproduce.
        ModelLoadError: naming file and key, if a setting is missing or makes no sense.
    """
    # A switch of Granite's: true, or missing, means that there is RoPE.
    if gguf.architecture == "granite" and not gguf.optional("rope.scaling.finetuned", bool, True):
        raise UnsupportedModelError(f"{gguf.path}: a model without RoPE is not supported")
    rope = {"rope_theta": gguf.optional("rope.freq_base", float, 10000.0)}
    turned = gguf.optional("rope.dimension_count", int, head_dim)
    if turned != head_dim:
        if gguf.architecture not in _PARTIAL:
            raise UnsupportedModelError(
                f"{gguf.path}: {gguf.key('rope.dimension_count')} {turned} differs from the head "
                f"size {head_dim}"
            )
        rope["partial_rotary_factor"] = turned / head_dim
    return {**_scaling(gguf, rope["rope_theta"], head_dim), **rope}


def _scaling(gguf: GGUFModel, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the type of scaling and its own settings."""
    kind = gguf.optional(_TYPE, str, "")
    is_llama3 = _LLAMA3 in gguf.tensors
    is_long = _LONG in gguf.tensors or _SHORT in gguf.tensors
    if is_long:
        kind = kind or "longrope"  # the converter writes no type for Phi-3
    factor = 0.0
    for name in ("rope.scale_linear", _FACTOR):  # the first is the older name
        factor = gguf.optional(name, float, factor)
    # Without a type, a factor is linear. A type that needs a factor says so where it is missing.
    kind = kind or ("linear" if factor not in (0.0, 1.0) else "none")
    if (is_llama3 and kind != "none") or (is_long and kind != "longrope"):
        raise UnsupportedModelError(
            f"{gguf.path}: RoPE scaling {kind!r} together with tensors of RoPE factors is not "
            "supported"
        )
    if kind == "yarn":
        return _yarn(gguf)
    if kind == "longrope":
        return _longrope(gguf)
    if gguf.optional(_ATTENTION, float, 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{gguf.path}: {gguf.key(_ATTENTION)} is supported with yarn and longrope alone"
        )
    if is_llama3:
        return _llama3(gguf, theta, head_dim)
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor or gguf.require(_FACTOR, float)}
    raise UnsupportedModelError(
        f"{gguf.path}: {gguf.key(_TYPE)} {kind!r} is not supported; minserve knows none, linear, "
        "yarn and longrope"
    )


def _yarn(gguf: GGUFModel) -> dict[str, Any]:
    """Return the settings of YaRN (Peng et al., 2023)."""
    factor = gguf.require(_FACTOR, float)
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": gguf.require(_ORIGINAL, int),
    }
    for name in ("beta_fast", "beta_slow"):
        if gguf.key(f"rope.scaling.yarn_{name}") in gguf.metadata:
            rope[name] = gguf.require(f"rope.scaling.yarn_{name}", float)
    extrapolation = gguf.optional("rope.scaling.yarn_ext_factor", float, 1.0)
    if extrapolation != 1.0:
        raise UnsupportedModelError(
            f"{gguf.path}: {gguf.key('rope.scaling.yarn_ext_factor')} {extrapolation} is not "
            "supported; it has to be 1"
        )
    # Both are factors on rotated vectors. The converter writes transformers' whole factor to the
    # second key; the first is llama.cpp's own and multiplies YaRN's usual factor.
    if gguf.key(_ATTENTION) in gguf.metadata:
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        rope["attention_factor"] = usual * gguf.require(_ATTENTION, float)
    if gguf.key("rope.scaling.yarn_attn_factor") in gguf.metadata:
        rope["attention_factor"] = gguf.require("rope.scaling.yarn_attn_factor", float)
    return rope


def _longrope(gguf: GGUFModel) -> dict[str, Any]:
    """Return the settings of LongRoPE (Ding et al., 2024)."""
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": gguf.read_numbers(_LONG),
        "short_factor": gguf.read_numbers(_SHORT),
        "original_max_position_embeddings": gguf.require(_ORIGINAL, int),
    }
    if gguf.key(_ATTENTION) in gguf.metadata:
        rope["attention_factor"] = gguf.require(_ATTENTION, float)
    return rope


def _llama3(gguf: GGUFModel, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the settings of Llama 3's scaling, of which a GGUF file keeps the result alone."""
    factors = torch.tensor(gguf.read_numbers(_LLAMA3), dtype=torch.float64)
    rope = {
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 4),
        # All Llama 3.x models use these three values, and the comparison below proves it for
        # this file.
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if theta <= 1.0:
        raise ModelLoadError(f"{gguf.path}: {gguf.key('rope.freq_base')} {theta} makes no sense")
    expected = _llama3_factors(rope, theta, head_dim)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{gguf.path}: tensor {_LLAMA3} holds RoPE factors that are not Llama 3's"
        )
    return rope


def _llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> torch.Tensor:
    """Return the divisors of the inverse frequencies in Llama 3's RoPE scaling, ``[head_dim / 2]``.

    The rule is that of Meta's reference code: long wavelengths are divided by ``factor``,
    short ones are kept, and wavelengths between them are interpolated.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * theta**exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / rope["factor"] + smooth)
