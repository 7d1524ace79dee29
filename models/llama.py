"""Llama and its relatives: pre-norm RMSNorm, RoPE, grouped-query attention, gated MLP.

The model is Llama's (Touvron et al., 2023). What a relative changes is a field of `LlamaConfig`
(families.py has them all), and most of it is folded into the weights when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.base import CausalLM, ModelShape, TensorSource
from minserve.models.embedding import read_embedding, read_head
from minserve.models.layers import Linear, Norm, WeightPlacement
from minserve.models.ranks import ALONE, Ranks
from minserve.models.rope import RotaryEmbedding, interleave
from minserve.models.rope_parameters import rotary_size
from minserve.models.tensor_part import TensorPart

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
        ranks: Ranks,
    ) -> None:
        self.shape = shape
        self.has_rope = not config.no_rope_layers or bool(config.no_rope_layers[index])
        read = _LayerReader(checkpoint, f"model.layers.{index}.", config, shape, ranks)
        self.input_norm = placement.rms_norm(read.norm("input_layernorm"), config.rms_norm_eps)
        self.qkv = placement.linear(*read.qkv())
        self.qk_norm: Norm | None = None
        if config.qk_norm:
            self.qk_norm = placement.rms_norm(read.qk_norm(), config.rms_norm_eps)
        self.o_proj = ranks.summed(placement.linear(*read.attention_output()))
        self.mlp_norm = placement.rms_norm(
            read.norm("post_attention_layernorm"), config.rms_norm_eps
        )
        gate, up = read.gate_up()
        self.mlp_in = placement.glu(gate, up, read.gate_up_biases(), ACTIVATIONS[config.hidden_act])
        self.down = ranks.summed(placement.linear(*read.down()))

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
    """Reads a rank's part of a layer's weights in the form in which the layer runs them.

    Rows of queries and keys are interleaved for RoPE, and factors are folded in.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        prefix: str,
        config: LlamaConfig,
        shape: ModelShape,
        ranks: Ranks,
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._config = config
        self._shape = shape
        self._ranks = ranks
        width = shape.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        # Rows of queries, keys and values: in the file, and of these this rank's.
        self._sizes = [heads * width, kv_heads * width, kv_heads * width]
        own_kv = ranks.kv_heads(heads, kv_heads, width)
        self._own = [ranks.queries(0, heads, kv_heads, width), own_kv, own_kv]

    def norm(self, name: str) -> Tensor:
        """Return the weight of a norm over hidden states."""
        return read_norm(
            self._checkpoint, f"{self._prefix}{name}.weight", self._shape.hidden_size, self._config
        )

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the common projection, ``[heads + 2 * kv heads, hidden]``."""
        names = [f"self_attn.{name}_proj" for name in "qkv"]
        query, key, value = self._parts(names, "self_attn.qkv_proj", self._sizes, self._own)
        weight = torch.cat((self._rotated(query), self._rotated(key), value))
        if not self._config.attention_bias:
            return weight, None
        biases = [
            self._bias(name, size, own)
            for name, size, own in zip(names, self._sizes, self._own, strict=True)
        ]
        return weight, torch.cat((self._rotated(biases[0]), self._rotated(biases[1]), biases[2]))

    def qk_norm(self) -> Tensor:
        """Return a norm's weight for each head of queries, then of keys, ``[.., head_dim]``."""
        weights = [
            self._rotated(self._get(f"self_attn.{name}_norm.weight", (self._shape.head_dim,)))
            for name in "qk"
        ]
        heads = (self._shape.num_heads, self._shape.num_kv_heads)
        return torch.cat([w.expand(n, -1) for w, n in zip(weights, heads, strict=True)])

    def attention_output(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the projection of what attention gives."""
        config = self._config
        own = self._ranks.queries(
            1, config.num_attention_heads, config.num_key_value_heads, self._shape.head_dim
        )
        has_bias = bool(self._config.output_bias)
        return self._to_residual("self_attn.o_proj", self._sizes[0], own, has_bias)

    def gate_up(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the MLP's first two projections."""
        size = self._config.intermediate_size
        own = self._ranks.part(0, size)
        names = ["mlp.gate_proj", "mlp.up_proj"]
        gate, up = self._parts(names, "mlp.gate_up_proj", [size] * 2, [own] * 2)
        return gate, up

    def gate_up_biases(self) -> tuple[Tensor, Tensor] | None:
        """Return the biases of the MLP's first two projections, if it has them."""
        if not self._config.mlp_bias:
            return None
        size = self._config.intermediate_size
        own = self._ranks.part(0, size)
        return self._bias("mlp.gate_proj", size, own), self._bias("mlp.up_proj", size, own)

    def down(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the MLP's last projection."""
        size = self._config.intermediate_size
        own = self._ranks.part(1, size)
        return self._to_residual("mlp.down_proj", size, own, self._config.mlp_bias)

    def _to_residual(
        self, name: str, size: int, own: TensorPart, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a projection whose output is added to the residual stream.

        Its inputs are divided among the ranks, so that one of them alone has the bias.
        """
        hidden = self._shape.hidden_size
        weight = self._scaled(self._get(f"{name}.weight", (hidden, size), own))
        if not has_bias or self._ranks.rank > 0:
            return weight, None
        return weight, self._scaled(self._bias(name, hidden))

    def _scaled(self, tensor: Tensor) -> Tensor:
        factor = self._config.residual_multiplier
        return tensor if factor == 1.0 else tensor.float() * factor

    def _parts(
        self, names: list[str], fused: str, sizes: list[int], own: list[TensorPart]
    ) -> list[Tensor]:
        """Return the weights of projections that a family may store as one tensor."""
        hidden = self._shape.hidden_size
        if self._config.fused_projections:
            shape = (sum(sizes), hidden)
            tensor = self._get(f"{fused}.weight", shape, TensorPart.of_fused(own, sizes))
            return list(tensor.split([part.length for part in own]))
        return [
            self._get(f"{name}.weight", (size, hidden), part)
            for name, size, part in zip(names, sizes, own, strict=True)
        ]

    def _rotated(self, tensor: Tensor) -> Tensor:
        head_dim = self._shape.head_dim
        return interleave(tensor, head_dim, rotary_size(self._config.rope_parameters, head_dim))

    def _bias(self, name: str, size: int, own: TensorPart | None = None) -> Tensor:
        return self._get(f"{name}.bias", (size,), own)

    def _get(self, name: str, shape: tuple[int, ...], own: TensorPart | None = None) -> Tensor:
        return self._checkpoint.get(f"{self._prefix}{name}", shape, own)


class Llama(CausalLM):
    """The model. Its weights are read from a checkpoint and repacked for their placement."""

    def __init__(
        self,
        checkpoint: TensorSource,
        config: LlamaConfig,
        placement: WeightPlacement,
        max_positions: int,
        ranks: Ranks,
    ) -> None:
        """``max_positions``: the longest sequence that is served."""
        self.shape = llama_shape(config, max_positions, ranks)
        shape = self.shape
        self.embed = read_embedding(
            checkpoint,
            "model.embed_tokens.weight",
            (shape.vocab_size, shape.hidden_size),
            config.tie_word_embeddings,
            placement,
            ranks,
        )
        self.embed_scale = config.embedding_multiplier
        if config.embedding_is_scaled:
            self.embed_scale *= shape.hidden_size**0.5
        self.placement = placement
        self.layers = [
            LlamaLayer(checkpoint, i, config, shape, placement, ranks)
            for i in range(shape.num_layers)
        ]
        norm = read_norm(checkpoint, "model.norm.weight", shape.hidden_size, config)
        if config.logits_scaling != 1.0:
            norm = norm.float() / config.logits_scaling
        self.norm = placement.rms_norm(norm, config.rms_norm_eps)
        rows = config.draft_vocab_size or shape.vocab_size
        head = read_head(checkpoint, self.embed, rows, config.tie_word_embeddings, ranks)
        self.head = ranks.gathered(placement.linear(head), rows)
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
        x = self.embed(token_ids, self.placement.pass_dtype(len(token_ids)))
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


def llama_shape(config: LlamaConfig, max_positions: int, ranks: Ranks = ALONE) -> ModelShape:
    """Return the shape of a Llama config that serves sequences of up to ``max_positions``."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=ranks.queries(0, heads, kv_heads, 1).length,
        num_kv_heads=ranks.num_kv_heads(heads, kv_heads),
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_positions,
        scale=config.head_dim**-0.5
        if config.attention_multiplier is None
        else config.attention_multiplier,
    )
