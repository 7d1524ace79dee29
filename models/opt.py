"""OPT, 125m to 66b: learned positions, LayerNorm before or after, ReLU MLP (Zhang et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.base import CausalLM, ModelShape, TensorSource
from minserve.models.embedding import read_embedding, read_head
from minserve.models.layers import Activation, Linear, Norm, WeightPlacement
from minserve.models.ranks import ALONE, Ranks
from minserve.models.tensor_part import TensorPart

if TYPE_CHECKING:
    from minserve.models.config import OPTConfig

# fairseq reserved the first rows of the position table.
POSITION_OFFSET = 2

ACTIVATIONS: dict[str, Activation] = {"relu": torch.relu_, "gelu": F.gelu}


class OPTLayer:
    """A decoder layer. ``pre_norm`` is false only for OPT-350m."""

    def __init__(
        self,
        checkpoint: TensorSource,
        index: int,
        config: OPTConfig,
        shape: ModelShape,
        placement: WeightPlacement,
        ranks: Ranks,
    ) -> None:
        hidden, prefix = config.hidden_size, f"model.decoder.layers.{index}."
        self.pre_norm = config.do_layer_norm_before
        self.head_dim = shape.head_dim
        self.num_heads = shape.num_heads

        def weight(name: str, rows: int, columns: int, own: TensorPart) -> Tensor:
            return checkpoint.get(f"{prefix}{name}.weight", (rows, columns), own)

        def bias(name: str, size: int, own: TensorPart | None = None) -> Tensor | None:
            if not config.enable_bias:
                return None
            return checkpoint.get(f"{prefix}{name}.bias", (size,), own)

        def summed(name: str, columns: int, own: TensorPart) -> Linear:
            """Return a linear whose inputs are divided; one rank alone has the bias."""
            added = bias(name, hidden) if ranks.rank == 0 else None
            return ranks.summed(placement.linear(weight(name, hidden, columns, own), added))

        projections = [f"self_attn.{name}_proj" for name in "qkv"]
        heads, channels = config.num_attention_heads, ranks.part(0, config.ffn_dim)
        own = ranks.part(0, heads, self.head_dim)
        biases = [one for name in projections if (one := bias(name, hidden, own)) is not None]
        self.qkv = placement.linear(
            torch.cat([weight(name, hidden, hidden, own) for name in projections]),
            torch.cat(biases) if biases else None,
        )
        self.out = summed("self_attn.out_proj", hidden, ranks.part(1, heads, self.head_dim))
        self.fc1 = placement.activated_linear(
            weight("fc1", config.ffn_dim, hidden, channels),
            bias("fc1", config.ffn_dim, channels),
            ACTIVATIONS[config.activation_function],
        )
        self.fc2 = summed("fc2", config.ffn_dim, ranks.part(1, config.ffn_dim))
        self.attention_norm = _norm(checkpoint, f"{prefix}self_attn_layer_norm", config, placement)
        self.mlp_norm = _norm(checkpoint, f"{prefix}final_layer_norm", config, placement)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears in the order of a pass; the third includes the MLP's activation."""
        return self.qkv, self.out, self.fc1, self.fc2

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        kv: LayerKV,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            x: ``[num_tokens, hidden]``, not yet added to the residual stream.
            residual: the residual stream; ``None`` before the first layer. Between post-norm
                layers ``x`` is the stream itself, and ``residual`` is ``None``.

        Returns:
            the next ``x`` and ``residual``.
        """
        if self.pre_norm:
            x, residual = self.attention_norm.add(x, residual)
        else:
            residual = x
        qkv = self.qkv(x).view(-1, 3 * self.num_heads, self.head_dim)
        backend.write_kv(qkv, kv, metadata)
        x = self.out(backend.forward(qkv[:, : self.num_heads], kv, metadata))
        if self.pre_norm:
            x, residual = self.mlp_norm.add(x, residual)
            return self.fc2(self.fc1(x)), residual
        x, _ = self.attention_norm.add(x, residual)
        x, _ = self.mlp_norm.add(self.fc2(self.fc1(x)), x)
        return x, None


class OPT(CausalLM):
    """The model. Its weights are read from a checkpoint and repacked for their placement."""

    def __init__(
        self,
        checkpoint: TensorSource,
        config: OPTConfig,
        placement: WeightPlacement,
        max_positions: int,
        ranks: Ranks,
    ) -> None:
        """``max_positions``: the longest sequence that is served."""
        self.shape = opt_shape(config, max_positions, ranks)
        self.placement = placement
        hidden, width = config.hidden_size, config.word_embed_proj_dim
        self.embed = read_embedding(
            checkpoint,
            "model.decoder.embed_tokens.weight",
            (config.vocab_size, width),
            config.tie_word_embeddings,
            placement,
            ranks,
        )
        self.embed_positions = placement.tensor(
            checkpoint.get(
                "model.decoder.embed_positions.weight",
                (config.max_position_embeddings + POSITION_OFFSET, hidden),
            )
        )
        self.project_in = self.project_out = None
        if width != hidden:
            project_in = checkpoint.get("model.decoder.project_in.weight", (hidden, width))
            project_out = checkpoint.get("model.decoder.project_out.weight", (width, hidden))
            self.project_in = placement.linear(project_in)
            self.project_out = placement.linear(project_out)
        self.layers = [
            OPTLayer(checkpoint, i, config, self.shape, placement, ranks)
            for i in range(config.num_hidden_layers)
        ]
        has_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        self.norm = (
            _norm(checkpoint, "model.decoder.final_layer_norm", config, placement)
            if has_norm
            else None
        )
        rows = config.vocab_size
        head = read_head(checkpoint, self.embed, rows, config.tie_word_embeddings, ranks)
        self.head = ranks.gathered(placement.linear(head), rows)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKV],
        backend: AttentionBackend,
        metadata: AttentionMetadata,
    ) -> Tensor:
        x = self.embed(token_ids, self.placement.pass_dtype(len(token_ids)))
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + F.embedding(positions + POSITION_OFFSET, self.embed_positions)
        residual = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, layer_kv, backend, metadata)
        return x if residual is None else x.add_(residual)

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.placement.pass_dtype(len(hidden)))
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return self.head(hidden).float()


def opt_shape(config: OPTConfig, max_positions: int, ranks: Ranks = ALONE) -> ModelShape:
    """Return the shape of an OPT config that serves sequences of up to ``max_positions``."""
    head_dim = config.hidden_size // config.num_attention_heads
    heads = ranks.part(0, config.num_attention_heads).length
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_positions,
        scale=head_dim**-0.5,
    )


def _norm(
    checkpoint: TensorSource, name: str, config: OPTConfig, placement: WeightPlacement
) -> Norm:
    size = config.hidden_size
    if not config.layer_norm_elementwise_affine:
        return placement.layer_norm(size, None, None)
    weight = checkpoint.get(f"{name}.weight", (size,))
    return placement.layer_norm(size, weight, checkpoint.get(f"{name}.bias", (size,)))
