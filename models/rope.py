"""RoPE (Su et al., 2021): which rotations a model's positions stand for, scaled ones included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minserve.models.rope_parameters import rotary_size
from minserve.models.weights.packed_tensor import PackedTensor

# Positions whose rotations are computed together.
_PART = 65536


class RotaryEmbedding:
    """RoPE for heads whose paired dimensions lie side by side.

    It computes the rotations; attention backends apply them, before keys enter the KV cache.

    Checkpoints pair dimension ``i`` with ``i + rotary_size / 2``; `interleave` reorders the
    rows of the query and key projections once so that each pair is one complex number
    and a rotation one multiplication. Scores are unchanged: queries and keys are
    permuted alike. Dimensions that RoPE leaves alone are pairs that are multiplied by one.
    """

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        parameters: Mapping[str, Any],
        device: torch.device,
        original_positions: int,
    ) -> None:
        """Compute the rotations of every position.

        Args:
            max_positions: the longest sequence that is served.
            parameters: as `LlamaConfig.rope_parameters`, checked.
            original_positions: the model's ``max_position_embeddings``.
        """
        size = rotary_size(parameters, head_dim)
        frequencies, magnitude = rope_frequencies(
            size, parameters, max_positions, original_positions
        )
        self._cis = torch.ones(max_positions, head_dim // 2, dtype=torch.complex64)
        # In parts: the whole table's angles and magnitudes would take its memory twice more.
        for start in range(0, max_positions, _PART):
            positions = torch.arange(start, min(start + _PART, max_positions), dtype=torch.float32)
            angles = torch.outer(positions, frequencies)
            turns = torch.polar(torch.full_like(angles, magnitude), angles)
            # The other pairs of a head stay as they are.
            self._cis[start : start + _PART, : size // 2] = turns
        self._cis = self._cis.to(device)

    def rotations(self, positions: Tensor) -> Tensor:
        """Return complex64 ``[num_tokens, 1, head_dim / 2]``; called once per iteration."""
        return self._cis[positions].unsqueeze(1)


def interleave(weight: Tensor, head_dim: int, rotary: int) -> Tensor:
    """Reorder and return the rows of a projection (weight ``[out, in]`` or vector ``[out]``).

    Args:
        rotary: how many of a head's dimensions, the first ones, are rotated.
    """
    if isinstance(weight, PackedTensor):
        return weight[interleave(torch.arange(len(weight)), head_dim, rotary)]
    heads = weight.view(-1, head_dim, *weight.shape[1:])
    halves = heads[:, :rotary].reshape(-1, 2, rotary // 2, *weight.shape[1:])
    turned = halves.transpose(1, 2).reshape(-1, rotary, *weight.shape[1:])
    return torch.cat((turned, heads[:, rotary:]), dim=1).reshape(weight.shape)


def rope_frequencies(
    size: int, parameters: Mapping[str, Any], max_positions: int, original_positions: int
) -> tuple[Tensor, float]:
    """Return the radians per position of each pair, float32 ``[size / 2]``, and a magnitude.

    Queries and keys are multiplied by the magnitude, which is 1 for most types. The types are
    ``default``, ``linear`` (Chen et al., 2023), ``dynamic`` (NTK-aware; the base grows with
    the longest sequence that is served), ``yarn`` (Peng et al., 2023), ``longrope`` (Ding et
    al., 2024; one list of divisors for services within the original length, another for longer
    ones) and ``llama3`` (Llama 3.1's piecewise scaling). They are computed as transformers does,
    but for one sequence length: that of the longest sequence that is served, since keys in the
    cache keep their rotation.
    """
    kind, base = parameters["rope_type"], parameters["rope_theta"]
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    if kind == "dynamic":
        longest = max(max_positions, original_positions)
        stretched = parameters["factor"] * longest / original_positions - parameters["factor"] + 1
        base = base * stretched ** (size / (size - 2))
    frequencies = 1.0 / (base**exponents)
    if kind == "linear":
        return frequencies / parameters["factor"], 1.0
    if kind == "yarn":
        return _yarn(frequencies, size, parameters)
    if kind == "longrope":
        return _longrope(base**exponents, parameters, max_positions)
    if kind == "llama3":
        return _llama3(frequencies, parameters), 1.0
    return frequencies, 1.0


def _llama3(frequencies: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Divide long wavelengths by ``factor``, keep short ones, with a ramp between."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / parameters["factor"] * (1 - keep)


def _yarn(frequencies: Tensor, size: int, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Divide pairs that turn fewer than ``beta_slow`` times in the original length by ``factor``,
    and keep those that turn more than ``beta_fast`` times, with a ramp between.
    """
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        base = parameters["rope_theta"]
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair_of(parameters.get("beta_fast") or 32.0)
    high = pair_of(parameters.get("beta_slow") or 1.0)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # Where both are one pair, the ramp is a step.
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    divided = ramp.clamp(0, 1)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        mscale, everywhere = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and everywhere:
            magnitude = _yarn_scale(factor, mscale) / _yarn_scale(factor, everywhere)
        else:
            magnitude = _yarn_scale(factor, 1.0)
    return frequencies / factor * divided + frequencies * (1 - divided), float(magnitude)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(
    powers: Tensor, parameters: Mapping[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """Divide each frequency by its own factor, of the list for the length that is served."""
    original = parameters["original_max_position_embeddings"]
    which = "long_factor" if max_positions > original else "short_factor"
    factor, magnitude = parameters["factor"], parameters.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (torch.tensor(parameters[which], dtype=torch.float32) * powers), float(magnitude)
