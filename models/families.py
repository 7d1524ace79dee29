"""What each family of Llama-like models changes: one table, read by `LlamaConfig`.

Entries have transformers' names. A family without an entry here is another model, with a file of
its own (opt.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LlamaFamily:
    """The differences between a family and Llama.

    Attributes:
        defaults: entries of a config.json that the family fills in with other values than Llama.
        own: entries of a config.json that mean something in this family alone (`OWN`).
        fixed: fields of `LlamaConfig` that the family's files do not decide.
        window: when keys beyond ``sliding_window`` are out of sight: ``never``, ``always`` if the
            entry is there, ``asked`` if ``use_sliding_window`` asks for it, or ``deep``: asked
            for, from layer ``max_window_layers`` on.
        activations: the names of activations that the family's MLP may have.
        partial_rotary: true if RoPE may turn a part of each head alone.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    window: str = "never"
    activations: tuple[str, ...] = ("silu", "swish")
    partial_rotary: bool = False


_MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)
_WITHOUT_ROPE = ("no_rope_layers", "no_rope_layer_interval")
_BY_FAMILY_ALONE = (
    "output_bias",
    "qk_norm",
    "fused_projections",
    "norm_offset",
    "embedding_is_scaled",
)
# Fields of `LlamaConfig` that a config.json sets only in the families that list them as their own.
OWN = (*_MULTIPLIERS, *_WITHOUT_ROPE, *_BY_FAMILY_ALONE)
_NO_BIASES = {"attention_bias": False, "output_bias": False, "mlp_bias": False}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}

FAMILIES: dict[str, LlamaFamily] = {
    "llama": LlamaFamily(),
    # Jiang et al., 2023.
    "mistral": LlamaFamily(
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed=_NO_BIASES,
        window="always",
    ),
    # Yang et al., 2024. Qwen2.5 and DeepSeek-R1-Distill-Qwen are of this family.
    "qwen2": LlamaFamily(
        defaults=_QWEN, fixed={**_NO_BIASES, "attention_bias": True}, window="deep"
    ),
    # Yang et al., 2025.
    "qwen3": LlamaFamily(
        defaults={**_QWEN, "head_dim": 128},
        fixed={"mlp_bias": False, "qk_norm": True},
        window="deep",
    ),
    # Abdin et al., 2024. Phi-3.5 and Phi-4-mini are of this family.
    "phi3": LlamaFamily(
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
        },
        fixed={**_NO_BIASES, "fused_projections": True},
        window="always",
        partial_rotary=True,
    ),
    # IBM, 2024: Granite 3, dense.
    "granite": LlamaFamily(defaults={"attention_multiplier": 1.0}, own=_MULTIPLIERS),
    # Hugging Face, 2025. Every fourth layer has no RoPE.
    "smollm3": LlamaFamily(
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        own=_WITHOUT_ROPE,
        window="asked",
    ),
    # Gemma Team, 2024: the first generation.
    "gemma": LlamaFamily(
        defaults={
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        fixed={"mlp_bias": False, "norm_offset": 1.0, "embedding_is_scaled": True},
        activations=("gelu_pytorch_tanh",),
    ),
}
