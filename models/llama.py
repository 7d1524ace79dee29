"""Llama: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU (Touvron et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.base import CausalLM, ModelShape, TensorSource
from minserve.models.layers import Linear, RotaryEmbedding, WeightPlacement

if TYPE_CHECKING:
    from minserve.models.config import LlamaConfig


class LlamaLayer:
    """A decoder layer. Query, key and value share one matmul, and so do gate and up."""

    def __init__(
        self,
        checkpoint: TensorSource,
        index: int,
        config: LlamaConfig,
        shape: ModelShape,
        placement: WeightPlacement,
    ) -> None:
        self.shape = shape
        q_size = shape.num_heads * shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        hidden, prefix = shape.hidden_size, f"model.layers.{index}."

        def weight(name: str, *size: int) -> Tensor:
            return checkpoint.get(f"{prefix}{name}.weight", size)

        def bias(name: str, size: int, present: bool) -> Tensor | None:
            return checkpoint.get(f"{prefix}{name}.bias", (size,)) if present else None

        def rotated(tensor: Tensor) -> Tensor:
            return RotaryEmbedding.interleave(tensor, shape.head_dim)

        def rotated_bias(name: str, size: int) -> Tensor | None:
            one = bias(name, size, config.attention_bias)
            return None if one is None else rotated(one)

        self.input_norm = placement.rms_norm(weight("input_layernorm", hidden), config.rms_norm_eps)
        self.qkv = placement.linear(
            torch.cat(
                [
                    rotated(weight("self_attn.q_proj", q_size, hidden)),
                    rotated(weight("self_attn.k_proj", kv_size, hidden)),
                    weight("self_attn.v_proj", kv_size, hidden),
                ]
            ),
            _cat(
                rotated_bias("self_attn.q_proj", q_size),
                rotated_bias("self_attn.k_proj", kv_size),
                bias("self_attn.v_proj", kv_size, config.attention_bias),
            ),
        )
        self.o_proj = placement.linear(
            weight("self_attn.o_proj", hidden, q_size),
            bias("self_attn.o_proj", hidden, config.attention_bias),
        )
        self.mlp_norm = placement.rms_norm(
            weight("post_attention_layernorm", hidden), config.rms_norm_eps
        )
        inner = config.intermediate_size
        self.mlp_in = placement.swiglu(
            weight("mlp.gate_proj", inner, hidden),
            weight("mlp.up_proj", inner, hidden),
            _swiglu_biases(checkpoint, prefix, config),
        )
        self.down = placement.linear(
            weight("mlp.down_proj", hidden, inner), bias("mlp.down_proj", hidden, config.mlp_bias)
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears in the order of a pass; the third includes the MLP's activation."""
        return self.qkv, self.o_proj, self.mlp_in, self.down

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotations: Tensor,
        kv: LayerKV,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x: ``[num_tokens, hidden]``, not yet added to the residual stream.
            residual: the residual stream; ``None`` before the first layer.

        Returns:
            the next ``x`` and ``residual``.
        """
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        x, residual = self.input_norm.add(x, residual)
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, self.shape.head_dim)
        backend.write_kv(qkv, kv, metadata, rotations)
        x = self.o_proj(backend.forward(qkv[:, :heads], kv, metadata))
        x, residual = self.mlp_norm.add(x, residual)
        return self.down(self.mlp_in(x)), residual


class Llama(CausalLM):
    """The model. Its weights are read from a checkpoint and repacked for their placement."""

    def __init__(
        self, checkpoint: TensorSource, config: LlamaConfig, placement: WeightPlacement
    ) -> None:
        self.shape = llama_shape(config)
        shape = self.shape
        embed = checkpoint.get("model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size))
        self.embed = embed.to(placement.device, placement.weight_dtype).contiguous()
        self.placement = placement
        self.layers = [
            LlamaLayer(checkpoint, i, config, shape, placement) for i in range(shape.num_layers)
        ]
        self.norm = placement.rms_norm(
            checkpoint.get("model.norm.weight", (shape.hidden_size,)), config.rms_norm_eps
        )
        head = self.embed
        if not config.tie_word_embeddings:
            rows = config.draft_vocab_size or shape.vocab_size
            head = checkpoint.get("lm_head.weight", (rows, shape.hidden_size))
        self.head = placement.linear(head)
        self.rope = RotaryEmbedding(
            shape.head_dim, shape.max_positions, config.rope_parameters, placement.device
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKV],
        backend: AttentionBackend,
        metadata: AttentionMetadata,
    ) -> Tensor:
        x = F.embedding(token_ids, self.embed).to(self.placement.pass_dtype(len(token_ids)))
        residual = None
        rotations = self.rope.rotations(positions)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, rotations, layer_kv, backend, metadata)
        return x if residual is None else x.add_(residual)

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.placement.pass_dtype(len(hidden)))
        return self.head(self.norm(hidden)).float()


def llama_shape(config: LlamaConfig) -> ModelShape:
    """Return the shape of a Llama config."""
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        scale=config.head_dim**-0.5,
    )


def _swiglu_biases(
    checkpoint: TensorSource, prefix: str, config: LlamaConfig
) -> tuple[Tensor, Tensor] | None:
    if not config.mlp_bias:
        return None
    size = (config.intermediate_size,)
    gate = checkpoint.get(f"{prefix}mlp.gate_proj.bias", size)
    return gate, checkpoint.get(f"{prefix}mlp.up_proj.bias", size)


def _cat(*tensors: Tensor | None) -> Tensor | None:
    present = [one for one in tensors if one is not None]
    return torch.cat(present) if present else None
