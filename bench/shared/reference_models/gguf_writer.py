"""Transformers models as GGUF files, written as llama.cpp's converter writes them.

The names of tensors come from the gguf package. What is done to values is taken from the
converter's sources: https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, RopeScalingType
from gguf.quants import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
}
# Families whose q and k rows the converter reorders, so that RoPE turns neighbours.
_PERMUTED = ("llama", "mistral", "granite", "smollm3")


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    weights: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, int | float | str | bool] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    max_tensors: int = 0,
) -> Path:
    """Write a model, without a tokenizer, and return the file (the first one of a split model).

    Args:
        model: a causal language model of llama, mistral, qwen2, qwen3, phi3, granite, smollm3 or
            gemma.
        path: the file to write; a split model's parts get ``-00001-of-00003`` and so on added.
        weights: the type of all matrices that it fits; vectors stay in float32, as in real files.
        metadata: further entries, or other values of entries that would be written anyway.
        tensors: further tensors, by their GGUF names.
        max_tensors: of one file; 0 writes one file whatever its size.
    """
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(
        path, gguf.MODEL_ARCH_NAMES[architecture], split_max_tensors=max_tensors
    )
    _add_settings(writer, config)
    for key, value in (metadata or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        writer.kv_data[0].pop(key, None)
        kinds.get(type(value), writer.add_float32)(key, value)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ValueError(f"the gguf package knows no name for {name!r}")
        values = _stored_values(name, tensor.float(), config).numpy()
        kind = _kind(values, weights)
        writer.add_tensor(there, quantize(values, kind), raw_dtype=kind)
    for name, values in {**_rope_tensors(model), **(tensors or {})}.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _kind(values: np.ndarray, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the type of one tensor; rows that are no whole number of blocks become float16."""
    if values.ndim == 1:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if values.shape[-1] % block == 0 else GGMLQuantizationType.F16


def _stored_values(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Return a tensor's values as the converter stores them."""
    if config.model_type == "gemma" and name.endswith("norm.weight"):
        return tensor + 1.0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if config.model_type in _PERMUTED and f".{part}." in name:
            halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
            return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()
    return tensor


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    ends = config.eos_token_id
    for add, token in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id),
        ends if isinstance(ends, list) else [ends] if ends is not None else [],
        strict=False,
    ):
        add(token)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None and config.model_type != "phi3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    _add_rope(writer, config)


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope, kind = config.rope_parameters, config.rope_parameters["rope_type"]
    turned = _turned(config)
    if config.model_type in _PERMUTED:
        writer.add_rope_dimension_count(turned)
    if config.model_type != "gemma":
        writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "phi3":
        writer.add_rope_dimension_count(turned)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
        if kind == "longrope":
            longest, original = (
                config.max_position_embeddings, config.original_max_position_embeddings
            )  # fmt: skip
            writer.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(longest / original) / math.log(original))
            )
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise ValueError(f"the converter writes no RoPE scaling {kind!r}")
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])


def _rope_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return the factors of scalings that the file keeps as tensors."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope["rope_type"] == "llama3":
        dim = _turned(model.config)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        return {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy()}
    return {}


def _turned(config: Any) -> int:
    """Return how many dimensions of a head RoPE turns."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
