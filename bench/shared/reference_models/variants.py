"""The model variants that are compared with transformers: at least one of all that differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

POSITIONS = 256
PROMPT_LENGTHS = (1, 5, 37, 123)


@dataclass(frozen=True)
class ModelVariant:
    """A model variant.

    Attributes:
        family: transformers' ``model_type``.
        settings: entries of transformers' config class.
        form: safetensors, sharded, bin or gguf.
        dtype: of minserve's arithmetic; transformers' is float32.
        edits: entries of config.json that are changed once the model is saved.
        longest: the longest sequence that is served; ``None``: the model's own.
        lengths: tokens of the prompts.
        continues: true if greedy continuations are compared too.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    form: str = "safetensors"
    dtype: str = "float32"
    edits: dict[str, Any] = field(default_factory=dict)
    longest: int | None = None
    lengths: tuple[int, ...] = PROMPT_LENGTHS
    continues: bool = True


def rope(kind: str, **values: Any) -> dict[str, Any]:
    """Return RoPE settings as an entry of a config class."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


BIAS, MLP_BIAS, TIED = {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
ORIGINAL = {"original_max_position_embeddings": 64}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
YARN = rope("yarn", factor=4.0, **ORIGINAL)
DYNAMIC = rope("dynamic", factor=4.0)
PAIRS = 8  # of a head of 16 dimensions
LONGROPE = {
    **rope("longrope", short_factor=[1.0 + i / 8 for i in range(PAIRS)],
           long_factor=[1.5 + i for i in range(PAIRS)]),
    **ORIGINAL,
}  # fmt: skip
PARTIAL = rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
               long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], partial_rotary_factor=0.75)  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 4.0,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
SHORT = (1, 5, 37)


def _everywhere(name: str, family: str, **settings: Any) -> list[ModelVariant]:
    """Return a variant as a folder in two dtypes and as a GGUF file."""
    return [
        ModelVariant(name, family, settings),
        ModelVariant(f"{name}, bfloat16", family, settings, dtype="bfloat16"),
        ModelVariant(f"{name}, GGUF", family, settings, "gguf"),
    ]


CASES = [
    *_everywhere("llama, GQA 2", "llama"),
    ModelVariant("llama, one KV head per head", "llama", {"num_key_value_heads": 6}),
    ModelVariant("llama, GQA 3, tied", "llama", {"num_key_value_heads": 2, **TIED}),
    ModelVariant("llama, one KV head", "llama", {"num_key_value_heads": 1}),
    ModelVariant("llama, attention bias", "llama", BIAS),
    ModelVariant("llama, MLP bias", "llama", MLP_BIAS),
    ModelVariant("llama, both biases, sharded", "llama", {**BIAS, **MLP_BIAS}, "sharded"),
    ModelVariant("llama, wide heads", "llama", {"head_dim": 32}),
    ModelVariant("llama, odd widths", "llama", {"hidden_size": 60, "intermediate_size": 101, "head_dim": 10}),
    ModelVariant("llama, RoPE theta 1e6", "llama", rope("default", rope_theta=1e6)),
    ModelVariant("llama, RoPE linear", "llama", rope("linear", factor=4.0)),
    ModelVariant("llama, RoPE linear, GGUF", "llama", rope("linear", factor=4.0), "gguf"),
    ModelVariant("llama, RoPE llama3", "llama", LLAMA3),
    ModelVariant("llama, RoPE yarn", "llama", YARN),
    ModelVariant("llama, RoPE yarn, GGUF", "llama", YARN, "gguf"),
    ModelVariant("llama, RoPE dynamic, within", "llama", DYNAMIC),
    ModelVariant("llama, RoPE dynamic, beyond", "llama", {**DYNAMIC, "max_position_embeddings": 64},
                 longest=123, lengths=(123,), continues=False),
    ModelVariant("llama, RoPE longrope, within", "llama", LONGROPE, longest=64, lengths=SHORT, continues=False),
    ModelVariant("llama, pytorch_model.bin", "llama", {}, "bin"),
    ModelVariant("llama, said to be tied, but not", "llama", UNTIED, edits=TIED),
    *_everywhere("mistral", "mistral"),
    ModelVariant("mistral, window 64", "mistral", {"sliding_window": 64}, lengths=SHORT, continues=False),
    ModelVariant("mistral, wide heads, sharded", "mistral", {"head_dim": 32}, "sharded"),
    *_everywhere("qwen2", "qwen2"),
    ModelVariant("qwen2, tied, GGUF", "qwen2", TIED, "gguf"),
    ModelVariant("qwen2, RoPE yarn", "qwen2", YARN),
    ModelVariant("qwen2, window 64", "qwen2", QWEN_WINDOW, lengths=SHORT, continues=False),
    *_everywhere("qwen3", "qwen3", head_dim=32),
    ModelVariant("qwen3, attention bias", "qwen3", BIAS),
    ModelVariant("qwen3, tied, RoPE yarn", "qwen3", {**TIED, **YARN}),
    *_everywhere("phi3", "phi3"),
    ModelVariant("phi3, GQA 3, sharded", "phi3", {"num_key_value_heads": 2}, "sharded"),
    ModelVariant("phi3, short longrope", "phi3", LONGROPE, longest=64, lengths=SHORT, continues=False),
    ModelVariant("phi3, long longrope", "phi3", LONGROPE, lengths=(65, 123)),
    ModelVariant("phi3, long longrope, GGUF", "phi3", LONGROPE, "gguf", lengths=(65, 123)),
    ModelVariant("phi3, part of each head rotated", "phi3", {**PARTIAL, **ORIGINAL}, lengths=(65, 123)),
    ModelVariant("phi3, part of each head, GGUF", "phi3", {**PARTIAL, **ORIGINAL}, "gguf", lengths=(65, 123)),
    ModelVariant("phi3, window 64", "phi3", {"sliding_window": 64}, lengths=SHORT, continues=False),
    *_everywhere("granite", "granite", **MULTIPLIERS),
    ModelVariant("granite, tied, biases", "granite", {**MULTIPLIERS, **TIED, **BIAS, **MLP_BIAS}),
    *_everywhere("smollm3", "smollm3", num_hidden_layers=5),
    ModelVariant("smollm3, untied, other layers without RoPE", "smollm3", {**UNTIED, "no_rope_layers": [0, 1, 0]}),
    ModelVariant("smollm3, both biases", "smollm3", {**BIAS, **MLP_BIAS}),
    *_everywhere("gemma", "gemma", head_dim=32),
    ModelVariant("gemma, one KV head, wide", "gemma", {"num_key_value_heads": 1, "head_dim": 64}),
    ModelVariant("gemma, untied", "gemma", UNTIED),
    ModelVariant("opt, as 125m", "opt"),
    ModelVariant("opt, as 125m, bfloat16", "opt", dtype="bfloat16"),
    ModelVariant("opt, as 350m", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    ModelVariant("opt, post-norm", "opt", {"do_layer_norm_before": False}),
    ModelVariant("opt, projected embedding, pre-norm", "opt", {"word_embed_proj_dim": 40}),
    ModelVariant("opt, as 2.7b (head_dim 80)", "opt", {"hidden_size": 160, "num_attention_heads": 2}),
    ModelVariant("opt, as 6.7b and 30b (head_dim 128), sharded", "opt", {"hidden_size": 256, "num_attention_heads": 2}, "sharded"),
    ModelVariant("opt, no biases", "opt", {"enable_bias": False}),
    ModelVariant("opt, plain layer norms", "opt", {"layer_norm_elementwise_affine": False}),
    ModelVariant("opt, no final norm", "opt", {"_remove_final_layer_norm": True}),
    ModelVariant("opt, untied head", "opt", UNTIED),
    ModelVariant("opt, said to be tied, but not", "opt", UNTIED, edits=TIED),
    ModelVariant("opt, GELU", "opt", {"activation_function": "gelu"}),
    ModelVariant("opt, pytorch_model.bin", "opt", {}, "bin"),
]  # fmt: skip
