"""The two ends of a model, which lie over its vocabulary: embeddings and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.models.base import TensorSource
from minserve.models.layers import WeightPlacement
from minserve.models.ranks import Ranks
from minserve.models.tensor_part import TensorPart

HEAD = "lm_head.weight"
# Embeddings that are looked up together where all are wanted.
_ROWS_AT_ONCE = 8192


class Embedding:
    """The embeddings of tokens, each rank with those of its part of the vocabulary.

    Attributes:
        table: the rows of this rank, ``[at least as many as the part has, width]``.
        ranks: the group that has the whole.
    """

    __slots__ = ("_length", "_start", "ranks", "table")

    def __init__(self, table: Tensor, part: TensorPart, ranks: Ranks) -> None:
        """``part``: which rows of the vocabulary the table has."""
        self.table = table
        self.ranks = ranks
        self._start, self._length = part.runs[0]

    def __call__(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``[num_tokens, width]`` in ``dtype`` for int64 ``[num_tokens]``, on every rank."""
        if self.ranks.size == 1:
            return F.embedding(token_ids, self.table).to(dtype)
        rows = token_ids - self._start
        elsewhere = (rows < 0) | (rows >= self._length)
        found = F.embedding(rows.masked_fill_(elsewhere, 0), self.table).to(dtype)
        return self.ranks.all_reduce(found.masked_fill_(elsewhere.unsqueeze(-1), 0.0))

    def rows(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of many tokens as they are kept; every rank must call it."""
        parts = token_ids.to(self.table.device).split(_ROWS_AT_ONCE)
        return torch.cat([self(part, self.table.dtype) for part in parts])


def read_embedding(
    source: TensorSource,
    name: str,
    shape: tuple[int, int],
    is_tied: bool,
    placement: WeightPlacement,
    ranks: Ranks,
) -> Embedding:
    """Return the tokens' embeddings; each rank reads its part of ``[vocab_size, width]``.

    Of two tied tensors a file may hold one alone, and safetensors' `save_model` keeps the head.
    """
    names = source.names()
    only_head = is_tied and name not in names and HEAD in names
    part = ranks.vocabulary(shape[0])
    rows = source.get(HEAD if only_head else name, shape, part)
    return Embedding(placement.embedding(ranks.padded(rows, shape[0])), part, ranks)


def read_head(
    source: TensorSource, embed: Embedding, rows: int, is_tied: bool, ranks: Ranks
) -> Tensor:
    """Return the weight of the head, or of this rank's part of it: that of the embeddings if both
    are tied.

    Some files say that they are tied and hold another head all the same, as fine-tuning leaves
    them. Then the head in the file is the model's.

    Args:
        rows: of the whole head.
    """
    table = embed.table
    if is_tied and HEAD not in source.names():
        return table
    own = source.get(HEAD, (rows, table.shape[1]), ranks.vocabulary(rows))
    head = ranks.padded(own, rows)
    tied = is_tied and torch.equal(head.to(table.device, table.dtype), table)
    return table if tied else head
