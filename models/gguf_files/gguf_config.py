"""`gguf_config`: the entries of a config.json that correspond to a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.gguf_files.gguf_file import token_id
from minserve.models.gguf_files.gguf_model import GGUFModel
from minserve.models.gguf_files.gguf_rope import gguf_rope

# llama.cpp gives SmolLM3 no RoPE in every fourth layer; a GGUF file does not say so.
_NO_ROPE_STEP = 4


def gguf_config(gguf: GGUFModel) -> dict[str, Any]:
    """Return what transformers would have in the config.json of a model in GGUF form.

    Raises:
        UnsupportedModelError: for a variant that minserve cannot run.
        ModelLoadError: naming file and key, if a value is missing or makes no sense.
    """
    heads, kv_heads = gguf.head_counts()
    hidden, layers = gguf.require("embedding_length", int), gguf.require("block_count", int)
    head_dim = gguf.optional("attention.key_length", int, 0) or hidden // heads
    value_dim = gguf.optional("attention.value_length", int, 0) or hidden // heads
    if head_dim < 1:
        raise ModelLoadError(f"{gguf.path}: {heads} heads of {hidden} numbers cannot be")
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{gguf.path}: {gguf.key('attention.value_length')} {value_dim} differs from the head "
            f"size {head_dim}"
        )
    special = {name: token_id(gguf.metadata, name, gguf.path) for name in ("bos", "eos", "eot")}
    config = {
        "model_type": gguf.architecture,
        "vocab_size": gguf.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": gguf.require("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": gguf.require("context_length", int),
        "rms_norm_eps": gguf.require("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": gguf_rope(gguf, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": special["bos"],
        "eos_token_id": sorted({i for i in (special["eos"], special["eot"]) if i is not None})
        or None,
    }
    return config | _FAMILIES.get(gguf.architecture, lambda _: {})(gguf)


def _llama(gguf: GGUFModel) -> dict[str, Any]:
    """Tell Mistral, which llama.cpp calls llama, by the window: without one they are the same."""
    window = gguf.optional("attention.sliding_window", int, 0)
    if not window:
        return {}
    if any(name.endswith(".bias") for name in gguf.tensors):
        raise UnsupportedModelError(
            f"{gguf.path}: a sliding window together with biases is not supported"
        )
    return {"model_type": "mistral", "sliding_window": window}


def _phi3(gguf: GGUFModel) -> dict[str, Any]:
    """Phi-3's window is 0 in the file where there is none."""
    window = gguf.optional("attention.sliding_window", int, 0)
    original = gguf.optional("rope.scaling.original_context_length", int, None)
    return {
        "sliding_window": window or None,
        **({"original_max_position_embeddings": original} if original else {}),
    }


def _granite(gguf: GGUFModel) -> dict[str, Any]:
    """Granite's factors. The converter leaves out those that are 0."""
    head_dim = gguf.require("embedding_length", int) // gguf.require("attention.head_count", int)
    return {
        "embedding_multiplier": gguf.optional("embedding_scale", float, 0.0) or 1.0,
        "residual_multiplier": gguf.optional("residual_scale", float, 0.0) or 1.0,
        "attention_multiplier": gguf.optional("attention.scale", float, 0.0) or head_dim**-0.5,
        "logits_scaling": gguf.require("logit_scale", float),
    }


def _smollm3(gguf: GGUFModel) -> dict[str, Any]:
    layers = gguf.require("block_count", int)
    gguf.tensor(f"blk.{layers - 1}.attn_norm.weight")  # a false count would make an endless list
    return {
        "no_rope_layer_interval": _NO_ROPE_STEP,
        "no_rope_layers": [int((i + 1) % _NO_ROPE_STEP != 0) for i in range(layers)],
    }


_FAMILIES: dict[str, Callable[[GGUFModel], dict[str, Any]]] = {
    "llama": _llama,
    "phi3": _phi3,
    "granite": _granite,
    "smollm3": _smollm3,
}
