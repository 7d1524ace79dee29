"""The contents of a config.json as plain dataclasses, with transformers' names and defaults.

transformers' own classes would do, but importing them takes three seconds of every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_type_hints

from minserve.errors import ModelLoadError, UnsupportedModelError

DEFAULT_ROPE_THETA = 10000.0


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
    """The numbers that describe a Llama model.

    Attributes:
        draft_vocab_size: rows of the head of a draft model whose head covers only a part of the
            vocabulary; 0 means the whole vocabulary.
        rope_parameters: ``rope_type``, ``rope_theta`` and the other settings of that type.
    """

    model_type: ClassVar[str] = "llama"

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
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    draft_vocab_size: int = 0
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return super().from_dict({**values, "rope_parameters": _rope_parameters(values)})

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        _positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads", "max_position_embeddings")  # fmt: skip
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise ModelLoadError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"head_dim {self.head_dim} is odd, which RoPE cannot rotate")
        if self.hidden_act not in ("silu", "swish"):
            raise UnsupportedModelError(f"hidden_act {self.hidden_act!r} is not supported")
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError("a partial rotary embedding is not supported")


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
        _positive(self, "vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers",
                  "num_attention_heads", "max_position_embeddings")  # fmt: skip
        if not self.word_embed_proj_dim:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        if self.hidden_size % self.num_attention_heads:
            raise ModelLoadError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )
        if self.activation_function not in ("relu", "gelu"):
            raise UnsupportedModelError(
                f"activation_function {self.activation_function!r} is not supported"
            )


ModelConfig = LlamaConfig | OPTConfig
CONFIGS: dict[str, type[LlamaConfig] | type[OPTConfig]] = {"llama": LlamaConfig, "opt": OPTConfig}


def _rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling`` in its form."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelLoadError(f"the RoPE settings must be an object, not {rope!r:.80}")
    theta = rope.get("rope_theta") or values.get("rope_theta") or DEFAULT_ROPE_THETA
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rest = {k: v for k, v in rope.items() if k != "type"}
    return {**rest, "rope_type": kind, "rope_theta": float(theta)}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return the value as the field's type. JSON's 1 may stand for 1.0; a bool is no number."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        origin = getattr(kind, "__origin__", kind)
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool):
            return value
    raise ModelLoadError(f"{name} has the value {value!r:.80}, which is not of type {hint}")


def _positive(config: _Config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ModelLoadError(f"{name} must be at least 1, not {getattr(config, name)}")
