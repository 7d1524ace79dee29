"""The contents of a config.json as plain dataclasses, with transformers' names and defaults.

transformers' own classes would do, but importing them takes three seconds of every start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.families import FAMILIES, OWN, LlamaFamily
from minserve.models.rope_parameters import (
    check_rope,
    length_by_rope,
    most_positions_by_rope,
    rope_parameters,
)

_MOST_LAYERS, _LARGEST_SIZE = 1000, 10**8


@dataclass(frozen=True, kw_only=True)
class _Config:
    """Reads the known fields of a JSON object, checking their types."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from the entries of a config.json; entries without a field here are skipped.

        Raises:
            ModelLoadError: if a field's value makes no sense; the error names the field.
        """
        hints = get_type_hints(cls)
        given = {}
        for f in fields(cls):
            if values.get(f.name) is not None:
                given[f.name] = _checked(f.name, values[f.name], hints[f.name])
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(_Config):
    """The numbers that describe a Llama model or one of its relatives (families.py).

    Attributes:
        model_type: name of the family.
        attention_bias: true if the projections of queries, keys and values have biases.
        output_bias: the same of the attention's output; ``None``: as ``attention_bias``.
        qk_norm: true if each head of queries and keys has an RMSNorm before RoPE.
        fused_projections: true if q, k, v are one stored tensor, and gate and up another.
        norm_offset: what is added to each norm's stored weights.
        embedding_is_scaled: true if embeddings are multiplied by the root of ``hidden_size``.
        embedding_multiplier: factor on embeddings besides.
        residual_multiplier: factor on what each half of a layer adds to the residual stream.
        attention_multiplier: factor on attention scores; ``None`` means ``head_dim ** -0.5``.
        logits_scaling: divisor of logits.
        no_rope_layers: for each layer 1 if it has RoPE and 0 if it has none; empty: all have it.
        no_rope_layer_interval: without ``no_rope_layers``, every so manieth layer has no RoPE;
            0: all have it.
        sliding_window: tokens that a token sees, itself included; ``None``: all before it.
        draft_vocab_size: rows of the head of a draft model whose head covers only a part of the
            vocabulary; 0 means the whole vocabulary.
        rope_parameters: ``rope_type``, ``rope_theta`` and the other settings of that type.
    """

    model_type: str = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    output_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_projections: bool = False
    norm_offset: float = 0.0
    embedding_is_scaled: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    no_rope_layers: list[int] = field(default_factory=list)
    no_rope_layer_interval: int = 0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    draft_vocab_size: int = 0
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        family = FAMILIES[values.get("model_type") or "llama"]
        for entry, value in (("is_causal", False), ("use_bidirectional_attention", True)):
            if values.get(entry) is value:
                raise UnsupportedModelError(
                    f"{entry} is {str(value).lower()}: a model that sees what follows a token "
                    "generates no text"
                )
        given = {
            name: value
            for name, value in values.items()
            if value is not None and (name not in OWN or name in family.own)
        }
        merged = {**family.defaults, **given, **family.fixed}
        # These follow from others where a file says ``null``; where it says nothing, the family does.
        for name in ("num_key_value_heads", "head_dim"):
            if name in values and values[name] is None:
                merged.pop(name, None)
        merged.setdefault("max_position_embeddings", cls.max_position_embeddings)
        merged["sliding_window"] = _window(family, values)
        if family.activations == ("gelu_pytorch_tanh",) and given.get("hidden_act") == "gelu":
            merged["hidden_act"] = "gelu_pytorch_tanh"  # what Gemma's first files mean by it
        merged["rope_parameters"] = rope_parameters(merged)
        return super().from_dict(merged)

    def __post_init__(self) -> None:
        _token_ids(self)
        _sizes(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
               "num_attention_heads", "max_position_embeddings")  # fmt: skip
        self._fill_in()
        _sizes(self, "num_key_value_heads", "head_dim")
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise ModelLoadError(
                f"draft_vocab_size {self.draft_vocab_size} is not between 0 and vocab_size"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelLoadError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"head_dim {self.head_dim} is odd, which RoPE cannot rotate")
        if any(one not in (0, 1) for one in self.no_rope_layers):
            raise ModelLoadError("no_rope_layers holds something else than 0 and 1")
        if len(self.no_rope_layers) not in (0, self.num_hidden_layers):
            raise ModelLoadError(
                f"no_rope_layers has {len(self.no_rope_layers)} entries for "
                f"{self.num_hidden_layers} layers"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelLoadError(f"sliding_window must be at least 1, not {self.sliding_window}")
        for name in ("logits_scaling", "embedding_multiplier", "residual_multiplier",
                     "attention_multiplier", "rms_norm_eps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < abs(value) < math.inf:
                raise ModelLoadError(f"{name} has the value {value}")
        if self.rms_norm_eps < 0:
            raise ModelLoadError(f"rms_norm_eps must be above 0, not {self.rms_norm_eps}")
        family = FAMILIES[self.model_type]
        if self.hidden_act not in family.activations:
            raise UnsupportedModelError(f"hidden_act {self.hidden_act!r} is not supported")
        check_rope(self.rope_parameters, self.head_dim, family.partial_rotary)

    def _fill_in(self) -> None:
        """Compute what follows from other fields."""
        heads = self.num_attention_heads
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.output_bias is None:
            object.__setattr__(self, "output_bias", self.attention_bias)
        if self.no_rope_layer_interval and not self.no_rope_layers:
            interval = self.no_rope_layer_interval
            layers = [int((i + 1) % interval != 0) for i in range(self.num_hidden_layers)]
            object.__setattr__(self, "no_rope_layers", layers)

    @property
    def mlp_size(self) -> int:
        """The channels of each MLP."""
        return self.intermediate_size

    @property
    def max_positions(self) -> int:
        """The longest sequence that is served unless the settings say more or less."""
        return self._in_window(length_by_rope(self.rope_parameters, self.max_position_embeddings))

    @property
    def most_positions(self) -> int:
        """The longest sequence that the settings may ask for: RoPE scaling may allow more."""
        return self._in_window(
            most_positions_by_rope(self.rope_parameters, self.max_position_embeddings)
        )

    def _in_window(self, length: int) -> int:
        """Return a length within the sliding window: beyond it, attention would have to forget."""
        return length if self.sliding_window is None else min(length, self.sliding_window)


@dataclass(frozen=True, kw_only=True)
class OPTConfig(_Config):
    """The numbers that describe an OPT model. ``word_embed_proj_dim`` 0 means the hidden size."""

    model_type: ClassVar[str] = "opt"

    vocab_size: int = 50272
    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int = 0
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    layer_norm_elementwise_affine: bool = True
    enable_bias: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        _token_ids(self)
        if not self.word_embed_proj_dim:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        _sizes(self, "vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers",
               "num_attention_heads", "max_position_embeddings", "word_embed_proj_dim")  # fmt: skip
        if self.hidden_size % self.num_attention_heads:
            raise ModelLoadError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )
        if self.activation_function not in ("relu", "gelu"):
            raise UnsupportedModelError(
                f"activation_function {self.activation_function!r} is not supported"
            )

    @property
    def mlp_size(self) -> int:
        """The channels of each MLP."""
        return self.ffn_dim

    @property
    def max_positions(self) -> int:
        """The longest sequence that the table of positions allows."""
        return self.max_position_embeddings

    @property
    def most_positions(self) -> int:
        """The longest sequence that the settings may ask for."""
        return self.max_position_embeddings


ModelConfig = LlamaConfig | OPTConfig
CONFIGS: dict[str, type[LlamaConfig] | type[OPTConfig]] = {
    **dict.fromkeys(FAMILIES, LlamaConfig),
    "opt": OPTConfig,
}


def _window(family: LlamaFamily, values: Mapping[str, Any]) -> int | None:
    """Return the sliding window that a config.json asks for. A window that is ``null`` is none."""
    default = family.defaults.get("sliding_window")
    if family.window == "always":
        return values.get("sliding_window", default)
    if family.window == "never" or not values.get("use_sliding_window"):
        return None
    if family.window == "asked":
        return values.get("sliding_window", 4096)
    layers = values.get("layer_types")
    if layers is not None and "sliding_attention" not in layers:
        return None
    # Qwen's first layers see everything, and with few layers these are all.
    first = values.get("max_window_layers")
    if layers is None and first is not None and first >= (values.get("num_hidden_layers") or 32):
        return None
    return values.get("sliding_window", 4096)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return the value as the field's type. JSON's 1 may stand for 1.0; a bool is no number."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        origin, elements = get_origin(kind) or kind, get_args(kind)
        if origin is float and type(value) is int:
            return float(value) if abs(value) < 1e300 else math.inf
        fits = isinstance(value, origin) and (origin is bool or type(value) is not bool)
        if fits and origin is list:
            fits = all(type(one) is elements[0] for one in value)
        if fits:
            return value
    raise ModelLoadError(f"{name} has the value {value!r:.80}, which is not of type {hint}")


def _token_ids(config: LlamaConfig | OPTConfig) -> None:
    """Check that ids of special tokens are not negative."""
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(one < 0 for one in ids):
            raise ModelLoadError(f"{name} has the value {value!r:.80}, which is no token's id")


def _sizes(config: _Config, *names: str) -> None:
    """Check that numbers of things are at least 1, and not so large that no model could be."""
    for name in names:
        most = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
        value = getattr(config, name)
        if not 1 <= value <= most:
            raise ModelLoadError(f"{name} must be at least 1 and at most {most}, not {value:.6g}")
