"""The RoPE settings of a config.json: in one form, checked, and how long a sequence they allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minserve.errors import ModelLoadError, UnsupportedModelError

DEFAULT_ROPE_THETA = 10000.0
# The settings without which a type of scaling cannot be computed; rope.py says what they mean.
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}
# Older names of types.
_RENAMED = {"su": "longrope", "none": "default"}


def rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters``, or the older entries of a config.json in its form.

    These are ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor`` and
    ``original_max_position_embeddings``.

    Raises:
        ModelLoadError: if they are not an object.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ModelLoadError(f"the RoPE settings must be an object, not {rope!r:.80}")
    if any(isinstance(one, Mapping) for one in rope.values()):
        raise UnsupportedModelError("RoPE settings that differ between layers are not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str):
        raise ModelLoadError(f"the type of RoPE scaling is {kind!r:.80}, not a name")
    if values.get("model_type") == "phi3" and kind == "yarn":
        kind = "longrope"  # as Phi-3's first files call it
    found = {k: v for k, v in rope.items() if k != "type" and v is not None}
    found["rope_type"] = _RENAMED.get(kind, kind)
    theta = rope.get("rope_theta") or values.get("rope_theta") or DEFAULT_ROPE_THETA
    found["rope_theta"] = _number("rope_theta", theta)
    if values.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    _add_lengths(found, values)
    return found


def _add_lengths(rope: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add the length before scaling, and the factor where that follows from both lengths."""
    name, kind = "original_max_position_embeddings", rope["rope_type"]
    longest = values.get("max_position_embeddings")
    if values.get(name) is not None:
        rope[name] = values[name]
    if name not in REQUIRED.get(kind, ()):
        rope.pop(name, None)
        return
    is_given = name in rope
    rope.setdefault(name, longest)
    # Without it, YaRN's factor would be 1, and a forgotten one would go unnoticed.
    follows = kind == "longrope" or (kind == "yarn" and is_given)
    if follows and all(isinstance(one, int) and one > 0 for one in (longest, rope[name])):
        rope.setdefault("factor", longest / rope[name])


def check_rope(rope: Mapping[str, Any], head_dim: int, partial: bool) -> None:
    """Check that RoPE settings are known and complete.

    Args:
        partial: true if a part of each head may stay as it is.

    Raises:
        UnsupportedModelError: for another type of scaling.
        ModelLoadError: if a setting is missing or makes no sense; the error names it.
    """
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise UnsupportedModelError(
            f"RoPE scaling {kind!r} is not supported; supported: {', '.join(REQUIRED)}"
        )
    turned = rotary_size(rope, head_dim)
    if turned != head_dim and not partial:
        raise UnsupportedModelError("a partial rotary embedding is not supported")
    if turned < 2 or turned > head_dim or turned % 2:
        raise ModelLoadError(f"RoPE would turn {turned} of a head's {head_dim} dimensions")
    if kind == "dynamic" and turned < 4:
        raise ModelLoadError("dynamic RoPE scaling needs heads of more than 2 dimensions")
    for name in REQUIRED[kind]:
        if name not in rope:
            raise ModelLoadError(f"RoPE scaling {kind!r} needs {name!r}, which is missing")
        if name in ("short_factor", "long_factor"):
            _check_factors(name, rope[name], turned // 2)
        elif name == "original_max_position_embeddings":
            if _number(name, rope[name]) < 2:
                raise ModelLoadError(f"RoPE: {name} must be at least 2, not {rope[name]}")
        else:
            _number(name, rope[name])
    for name in OPTIONAL.get(kind, ()):
        if rope.get(name) is not None:
            _number(name, rope[name])
    if kind == "yarn" and rope["rope_theta"] <= 1:
        raise ModelLoadError(f"RoPE: rope_theta must be above 1, not {rope['rope_theta']}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ModelLoadError("RoPE: high_freq_factor must be above low_freq_factor")


def rotary_size(rope: Mapping[str, Any], head_dim: int) -> int:
    """Return how many of a head's dimensions RoPE turns: the first ones."""
    return int(head_dim * _number("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)))


def length_by_rope(rope: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Return the length of sequences that a model with these settings is meant for.

    Dynamic scaling changes every position once a longer sequence is allowed, so it is not
    stretched unless one is asked for.
    """
    if rope.get("rope_type") == "dynamic":
        return max_position_embeddings
    return most_positions_by_rope(rope, max_position_embeddings)


def most_positions_by_rope(rope: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Return the longest sequence that the scaling allows.

    The entry ``max_position_embeddings`` is the length before scaling for ``linear`` and
    ``dynamic``, and in some files for ``yarn``; for the others it is the length after it.
    """
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "dynamic"):
        return int(max_position_embeddings * max(1.0, rope["factor"]))
    if kind == "yarn":
        scaled = int(rope["original_max_position_embeddings"] * rope["factor"])
        return max(max_position_embeddings, scaled)
    return max_position_embeddings


def _check_factors(name: str, factors: Any, count: int) -> None:
    if not isinstance(factors, list):
        raise ModelLoadError(f"RoPE: {name} should be a list of numbers, not {factors!r:.80}")
    for factor in factors:
        _number(name, factor)
    if len(factors) != count:
        raise ModelLoadError(f"RoPE: {name} has {len(factors)} entries and needs {count}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise ModelLoadError(f"RoPE: {name} has the value {value!r:.80}, not a number above 0")
    return float(value)
