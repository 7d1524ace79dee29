"""Llama and its relatives: pre-norm RMSNorm, RoPE, grouped-query attention, gated MLP.

The model is Llama's (Touvron et al., 2023). What a relative changes is a field of `LlamaConfig`
(families.py has them all), and most of it is folded into the weights when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.base import CausalLM, ModelShape, TensorSource, read_embedding, read_head
from minserve.models.layers import Linear, Norm, WeightPlacement
from minserve.models.rope import RotaryEmbedding, interleave
from minserve.models.rope_parameters import rotary_size

if TYPE_CHECKING:
    from minserve.models.config import LlamaConfig

# Names of `WeightPlacement.glu` for transformers' names of activations.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


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
        self.has_rope = not config.no_rope_layers or bool(config.no_rope_layers[index])
        read = _LayerReader(checkpoint, f"model.layers.{index}.", config, shape)
        self.input_norm = placement.rms_norm(read.norm("input_layernorm"), config.rms_norm_eps)
        self.qkv = placement.linear(*read.qkv())
        self.qk_norm: Norm | None = None
        if config.qk_norm:
            self.qk_norm = placement.rms_norm(read.qk_norm(), config.rms_norm_eps)
        q_size = shape.num_heads * shape.head_dim
        self.o_proj = placement.linear(
            *read.to_residual("self_attn.o_proj", q_size, bool(config.output_bias))
        )
        self.mlp_norm = placement.rms_norm(
            read.norm("post_attention_layernorm"), config.rms_norm_eps
        )
        gate, up = read.gate_up()
        self.mlp_in = placement.glu(gate, up, read.gate_up_biases(), ACTIVATIONS[config.hidden_act])
        self.down = placement.linear(
            *read.to_residual("mlp.down_proj", config.intermediate_size, config.mlp_bias)
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
        if self.qk_norm is not None:
            self.qk_norm.replace(qkv[:, : heads + kv_heads])
        backend.write_kv(qkv, kv, metadata, rotations if self.has_rope else None)
        x = self.o_proj(backend.forward(qkv[:, :heads], kv, metadata))
        x, residual = self.mlp_norm.add(x, residual)
        return self.down(self.mlp_in(x)), residual


class _LayerReader:
    """Reads a layer's weights in the form in which the layer runs them.

    Rows of queries and keys are interleaved for RoPE, and factors are folded in.
    """

    def __init__(
        self, checkpoint: TensorSource, prefix: str, config: LlamaConfig, shape: ModelShape
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._config = config
        self._shape = shape
        self._kv_size = shape.num_kv_heads * shape.head_dim
        self._sizes = [shape.num_heads * shape.head_dim, self._kv_size, self._kv_size]

    def norm(self, name: str) -> Tensor:
        """Return the weight of a norm over hidden states."""
        return read_norm(
            self._checkpoint, f"{self._prefix}{name}.weight", self._shape.hidden_size, self._config
        )

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the common projection, ``[heads + 2 * kv heads, hidden]``."""
        names = [f"self_attn.{name}_proj" for name in "qkv"]
        query, key, value = self._parts(names, "self_attn.qkv_proj", self._sizes)
        weight = torch.cat((self._rotated(query), self._rotated(key), value))
        if not self._config.attention_bias:
            return weight, None
        biases = [self._bias(n, size) for n, size in zip(names, self._sizes, strict=True)]
        return weight, torch.cat((self._rotated(biases[0]), self._rotated(biases[1]), biases[2]))

    def qk_norm(self) -> Tensor:
        """Return a norm's weight for each head of queries, then of keys, ``[.., head_dim]``."""
        weights = [
            self._rotated(self._get(f"self_attn.{name}_norm.weight", (self._shape.head_dim,)))
            for name in "qk"
        ]
        heads = (self._shape.num_heads, self._shape.num_kv_heads)
        return torch.cat([w.expand(n, -1) for w, n in zip(weights, heads, strict=True)])

    def gate_up(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the MLP's first two projections."""
        sizes = [self._config.intermediate_size] * 2
        gate, up = self._parts(["mlp.gate_proj", "mlp.up_proj"], "mlp.gate_up_proj", sizes)
        return gate, up

    def gate_up_biases(self) -> tuple[Tensor, Tensor] | None:
        """Return the biases of the MLP's first two projections, if it has them."""
        if not self._config.mlp_bias:
            return None
        size = self._config.intermediate_size
        return self._bias("mlp.gate_proj", size), self._bias("mlp.up_proj", size)

    def to_residual(self, name: str, size: int, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a projection whose output is added to the residual stream."""
        hidden = self._shape.hidden_size
        weight = self._scaled(self._get(f"{name}.weight", (hidden, size)))
        return weight, self._scaled(self._bias(name, hidden)) if has_bias else None

    def _scaled(self, tensor: Tensor) -> Tensor:
        factor = self._config.residual_multiplier
        return tensor if factor == 1.0 else tensor.float() * factor

    def _parts(self, names: list[str], fused: str, sizes: list[int]) -> list[Tensor]:
        """Return the weights of projections that a family may store as one tensor."""
        hidden = self._shape.hidden_size
        if self._config.fused_projections:
            return list(self._get(f"{fused}.weight", (sum(sizes), hidden)).split(sizes))
        return [
            self._get(f"{name}.weight", (size, hidden))
            for name, size in zip(names, sizes, strict=True)
        ]

    def _rotated(self, tensor: Tensor) -> Tensor:
        head_dim = self._shape.head_dim
        return interleave(tensor, head_dim, rotary_size(self._config.rope_parameters, head_dim))

    def _bias(self, name: str, size: int) -> Tensor:
        return self._get(f"{name}.bias", (size,))

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._checkpoint.get(f"{self._prefix}{name}", shape)


class Llama(CausalLM):
    """The model. Its weights are read from a checkpoint and repacked for their placement."""

    def __init__(
        self,
        checkpoint: TensorSource,
        config: LlamaConfig,
        placement: WeightPlacement,
        max_positions: int,
    ) -> None:
        """``max_positions``: the longest sequence that is served."""
        self.shape = llama_shape(config, max_positions)
        shape = self.shape
        self.embed = placement.embedding(
            read_embedding(
                checkpoint,
                "model.embed_tokens.weight",
                (shape.vocab_size, shape.hidden_size),
                config.tie_word_embeddings,
            )
        )
        self.embed_scale = config.embedding_multiplier
        if config.embedding_is_scaled:
            self.embed_scale *= shape.hidden_size**0.5
        self.placement = placement
        self.layers = [
            LlamaLayer(checkpoint, i, config, shape, placement) for i in range(shape.num_layers)
        ]
        norm = read_norm(checkpoint, "model.norm.weight", shape.hidden_size, config)
        if config.logits_scaling != 1.0:
            norm = norm.float() / config.logits_scaling
        self.norm = placement.rms_norm(norm, config.rms_norm_eps)
        rows = config.draft_vocab_size or shape.vocab_size
        self.head = placement.linear(
            read_head(checkpoint, self.embed, rows, config.tie_word_embeddings)
        )
        self.rope = RotaryEmbedding(
            shape.head_dim,
            max_positions,
            config.rope_parameters,
            placement.device,
            config.max_position_embeddings,
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
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        residual = None
        rotations = self.rope.rotations(positions)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, rotations, layer_kv, backend, metadata)
        return x if residual is None else x.add_(residual)

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.placement.pass_dtype(len(hidden)))
        return self.head(self.norm(hidden)).float()


def read_norm(checkpoint: TensorSource, name: str, size: int, config: LlamaConfig) -> Tensor:
    """Return the factors of a norm, ``[size]``."""
    weight = checkpoint.get(name, (size,))
    return weight if not config.norm_offset else weight.float() + config.norm_offset


def llama_shape(config: LlamaConfig, max_positions: int) -> ModelShape:
    """Return the shape of a Llama config that serves sequences of up to ``max_positions``."""
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_positions,
        scale=config.head_dim**-0.5
        if config.attention_multiplier is None
        else config.attention_multiplier,
    )
