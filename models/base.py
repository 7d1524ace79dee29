"""`CausalLM`: the interface of a model family to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.layers import WeightPlacement

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers that the engine needs to size caches and check requests.

    Attributes:
        vocab_size: width of the logits.
        max_positions: longest sequence that is served.
        scale: factor on attention scores.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    scale: float


class TensorSource(Protocol):
    """A model's tensors by name, such as a checkpoint."""

    def names(self) -> set[str]:
        """Return the names of all tensors."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor, which must have the given shape.

        Raises:
            ModelLoadError: if it is missing or has another shape.
        """


class CausalLM(ABC):
    """A decoder over a flat batch of tokens; each layer reads and writes its paged KV.

    Attributes:
        embed: the tokens' embeddings, ``[vocab_size, width]``.
        placement: where the weights are, and in which form.
        linear_dtype: dtype of the linear weights; set by `build_model`.
    """

    shape: ModelShape
    embed: Tensor
    placement: WeightPlacement
    linear_dtype: torch.dtype

    @abstractmethod
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKV],
        backend: AttentionBackend,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Return the final hidden states ``[num_tokens, hidden]``.

        ``token_ids`` and ``positions`` are int64 ``[num_tokens]``.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits ``[rows, vocab_size]`` for ``[rows, hidden]``, which should hold
        only the rows whose logits are needed.
        """


def read_embedding(
    source: TensorSource, name: str, shape: tuple[int, int], is_tied: bool
) -> Tensor:
    """Return the tokens' embeddings, ``[vocab_size, width]``.

    Of two tied tensors a file may hold one alone, and safetensors' `save_model` keeps the head.
    """
    names = source.names()
    only_head = is_tied and name not in names and HEAD in names
    return source.get(HEAD if only_head else name, shape)


def read_head(source: TensorSource, embed: Tensor, rows: int, is_tied: bool) -> Tensor:
    """Return the head's weight, ``[rows, width]``: the embeddings if both are tied.

    Some files say that they are tied and hold another head all the same, as fine-tuning leaves
    them. Then the head in the file is the model's.

    Args:
        embed: the embeddings ``[vocab_size, width]`` as they are kept.
    """
    if is_tied and HEAD not in source.names():
        return embed
    head = source.get(HEAD, (rows, embed.shape[1]))
    tied = is_tied and torch.equal(head.to(embed.device, embed.dtype), embed)
    return embed if tied else head
