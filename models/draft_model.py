"""Draft models: small models of the same vocabulary, which may borrow the target's embeddings.

A draft model's checkpoint is that of any model, except for two things that it may leave out or
trim. Without ``model.embed_tokens.weight`` it uses the target's embeddings. With
``draft_vocab_size`` in its configuration, its head covers only the tokens of the tensor
``lm_head.token_ids``; without ``lm_head.weight`` the head's rows are their embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minserve.errors import ConfigError, ModelLoadError
from minserve.models.base import CausalLM
from minserve.models.config import ModelConfig
from minserve.models.embedding import HEAD
from minserve.models.finding.source import ModelSource, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.ranks import ALONE, Ranks
from minserve.models.registry import build_model
from minserve.models.tensor_check import TensorReport, check_tensors, refuse_misfits
from minserve.models.tensor_part import TensorPart
from minserve.models.weights.checkpoint import Checkpoint
from minserve.models.weights.loader import open_checkpoint

EMBEDDING, HEAD_IDS = "model.embed_tokens.weight", "lm_head.token_ids"


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A loaded draft model.

    Attributes:
        head_token_ids: int64 ``[head]``, the tokens that its logits stand for; ``None`` if they
            stand for the whole vocabulary.
    """

    model: CausalLM
    head_token_ids: Tensor | None = None


def check_vocabulary(source: ModelSource, config: ModelConfig, vocab_size: int) -> None:
    """Check that a draft model has as many tokens as the model.

    Raises:
        ConfigError: if it has not.
    """
    if config.vocab_size != vocab_size:
        raise ConfigError(
            f"the draft model {source.name} has a vocabulary of {config.vocab_size} tokens, the "
            f"model one of {vocab_size}; a draft model needs the model's vocabulary"
        )


def check_draft_tensors(checkpoint: Checkpoint, config: ModelConfig, width: int) -> TensorReport:
    """Compare a draft model's tensors with its files, as `check_tensors` does for any model.

    Args:
        width: of the embeddings of the model for which it drafts, which it may borrow.

    Returns:
        the report; what is borrowed is neither missing nor wanted.
    """
    report = check_tensors(checkpoint, config)
    trimmed = bool(getattr(config, "draft_vocab_size", 0))
    lent = {EMBEDDING, HEAD} if trimmed else {EMBEDDING}
    borrowed = {n for n in report.missing if n in lent and report.wanted[n][1] == width}
    missing = [name for name in report.missing if name not in borrowed]
    if trimmed and HEAD_IDS not in checkpoint.names():
        missing.append(HEAD_IDS)
    return replace(
        report,
        wanted={name: shape for name, shape in report.wanted.items() if name not in borrowed},
        missing=missing,
        unread=[name for name in report.unread if name != HEAD_IDS],
    )


def load_draft_model(
    source: ModelSource, target: CausalLM, placement: WeightPlacement, ranks: Ranks = ALONE
) -> DraftModel:
    """Read the draft model of a target model.

    Args:
        ranks: those of the target, if the draft model is divided as well: then each of them calls
            this. Otherwise one rank has the whole draft model, and the others call
            `lend_embeddings` meanwhile.

    Raises:
        ConfigError: if the sizes of their vocabularies differ, or it cannot be divided.
        ModelLoadError, UnsupportedModelError: if the draft model cannot be read.
    """
    config = load_config(source)
    check_vocabulary(source, config, target.shape.vocab_size)
    with open_checkpoint(source) as checkpoint:
        refuse_misfits(
            checkpoint, check_draft_tensors(checkpoint, config, target.embed.table.shape[1])
        )
        ids = None
        rows = getattr(config, "draft_vocab_size", 0)
        if rows:
            ids = checkpoint.get_ids(HEAD_IDS, below=config.vocab_size)
            if len(ids) != rows or config.tie_word_embeddings:
                raise ModelLoadError(
                    f"{checkpoint.describe(HEAD_IDS)}: {len(ids)} token ids do not fit a head of "
                    f"{rows} rows (draft_vocab_size; tie_word_embeddings "
                    f"{config.tie_word_embeddings})"
                )
        checkpoint.rounded_to = placement.read_dtype
        checkpoint.keeps_packed = placement.packed
        borrowing = _Borrowing(checkpoint, target, ids, ranks)
        longest = min(config.most_positions, target.shape.max_positions)
        model = build_model(borrowing, config, placement, longest, ranks)
    return DraftModel(model, None if ids is None else ids.to(placement.device))


def lend_embeddings(source: ModelSource, target: CausalLM) -> None:
    """Do this rank's part where a draft model on another rank borrows the target's embeddings.

    Args:
        source: the draft model, of whose weights no more than names and token ids are read.
    """
    config = load_config(source)
    with open_checkpoint(source, progress=False) as checkpoint:
        names = checkpoint.names()
        if EMBEDDING in names or (config.tie_word_embeddings and HEAD in names):
            return
        target.embed.rows(torch.arange(config.vocab_size))
        if HEAD not in names and HEAD_IDS in names:
            target.embed.rows(checkpoint.get_ids(HEAD_IDS, below=config.vocab_size))


class _Borrowing:
    """A checkpoint in which the target's embeddings take the place of missing embeddings."""

    def __init__(
        self, checkpoint: Checkpoint, target: CausalLM, ids: Tensor | None, ranks: Ranks
    ) -> None:
        self._checkpoint = checkpoint
        self._names = checkpoint.names()
        self._target = target
        self._ids = ids
        self._ranks = ranks

    def names(self) -> set[str]:
        return self._names

    def get(self, name: str, shape: tuple[int, ...], part: TensorPart | None = None) -> Tensor:
        if name in self._names:
            return self._checkpoint.get(name, shape, part)
        if name == EMBEDDING:
            self._check(name, (self._target.shape.vocab_size, self._width), shape)
            return self._embedding(part)
        if name == HEAD and self._ids is not None:
            rows = self._rows(self._ids, shape[1])
            self._check(name, tuple(rows.shape), shape)
            return rows if part is None else part.cut(rows)
        return self._checkpoint.get(name, shape, part)  # raises, naming what is missing

    @property
    def _width(self) -> int:
        return self._target.embed.table.shape[1]

    def _embedding(self, part: TensorPart | None) -> Tensor:
        """Return the target's embeddings: this rank's, or all if it has the whole draft model."""
        embed = self._target.embed
        if self._ranks.size < embed.ranks.size:
            return embed.rows(torch.arange(self._target.shape.vocab_size))
        return embed.table if part is None else embed.table[: part.length]

    def _rows(self, ids: Tensor, width: int) -> Tensor:
        """Return the embeddings of the tokens of a trimmed head."""
        if EMBEDDING in self._names:
            return self._checkpoint.get(EMBEDDING, (self._target.shape.vocab_size, width))[ids]
        return self._target.embed.rows(ids)

    def _check(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != tuple(wanted):
            raise ModelLoadError(
                f"the draft model's {name} would be the model's, whose shape is {found} and not "
                f"{tuple(wanted)}"
            )
