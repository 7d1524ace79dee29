"""`CausalLM`: the interface of a model family to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.layers import WeightPlacement
from minserve.models.tensor_part import TensorPart

if TYPE_CHECKING:
    from minserve.models.embedding import Embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers that the engine needs to size caches and check requests.

    Heads are those of this rank where several ranks run a model; all else is the whole model's.

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

    def get(self, name: str, shape: tuple[int, ...], part: TensorPart | None = None) -> Tensor:
        """Return a tensor, which must have the given shape, or a part of it.

        Raises:
            ModelLoadError: if it is missing or has another shape.
        """


class CausalLM(ABC):
    """A decoder over a flat batch of tokens; each layer reads and writes its paged KV.

    Attributes:
        embed: the tokens' embeddings; ``embed.table`` is ``[vocab_size, width]``, or a rank's rows.
        placement: where the weights are, and in which form.
        linear_dtype: dtype of the linear weights; set by `build_model`.
        packed_form: the form in which linear weights stay packed, such as AWQ; empty if they do not.
    """

    shape: ModelShape
    embed: Embedding
    placement: WeightPlacement
    linear_dtype: torch.dtype
    packed_form: str = ""

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

        Of several ranks, all must call it, and rank 0 alone gets the logits: the others get their
        own columns of them.
        """
