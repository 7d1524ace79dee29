"""`gguf_config`: the entries of a config.json that correspond to a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from minserve.errors import UnsupportedModelError
from minserve.models.gguf_file import GGUFFile


def gguf_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the entries of a config.json that correspond to a GGUF file's metadata."""
    get, need = gguf.metadata.get, gguf.require
    architecture = need("general.architecture", str)
    if architecture != "llama" or get("llama.expert_count", 0):
        kind = architecture + (" with experts" if architecture == "llama" else "")
        raise UnsupportedModelError(f"{gguf.path}: GGUF architecture {kind!r} is not supported")
    heads, kv_heads = gguf.head_counts()
    hidden = need("llama.embedding_length", int)
    head_dim = get("llama.attention.key_length") or hidden // heads
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{gguf.path}: {key} {get(key)} differs from the head size {head_dim}"
            )
    eos = [get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": gguf.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("llama.feed_forward_length", int),
        "num_hidden_layers": need("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("llama.context_length", int),
        "rms_norm_eps": need("llama.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _gguf_rope(gguf, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({i for i in eos if i is not None}) or None,
    }


def _gguf_rope(gguf: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Return RoPE settings under transformers' names; refuses scalings that it cannot reproduce."""
    theta = float(gguf.metadata.get("llama.rope.freq_base", 10000.0))
    scaling = gguf.metadata.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        factors = gguf.read("rope_freqs.weight").double()
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": round(float(factors.max()), 4),
            # GGUF keeps only the factors that follow from these. All Llama 3.x models
            # use these three values, and the comparison below proves it for this file.
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = _llama3_factors(rope, head_dim)
        if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
            raise UnsupportedModelError(
                f"{gguf.path}: tensor rope_freqs.weight holds RoPE factors that are not Llama 3's"
            )
        return rope
    if scaling == "linear":
        factor = float(gguf.require("llama.rope.scaling.factor", float))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling != "none":
        raise UnsupportedModelError(f"{gguf.path}: RoPE scaling {scaling!r} is not supported")
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Return the divisors of the inverse frequencies in Llama 3's RoPE scaling, ``[head_dim / 2]``.

    The rule is that of Meta's reference code: long wavelengths are divided by ``factor``,
    short ones are kept, and wavelengths between them are interpolated.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / rope["factor"] + smooth)
