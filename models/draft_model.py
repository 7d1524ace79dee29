"""Draft models: small models of the same vocabulary, which may borrow the target's embeddings.

A draft model's checkpoint is that of any model, except for two things that it may leave out or
trim. Without ``model.embed_tokens.weight`` it uses the target's embeddings. With
``draft_vocab_size`` in its configuration, its head covers only the tokens of the tensor
``lm_head.token_ids``; without ``lm_head.weight`` the head's rows are their embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from minserve.errors import ConfigError, ModelLoadError
from minserve.models.base import HEAD, CausalLM
from minserve.models.config import ModelConfig
from minserve.models.finding.source import ModelSource, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.registry import build_model
from minserve.models.tensor_check import TensorReport, check_tensors, refuse_misfits
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
    source: ModelSource, target: CausalLM, placement: WeightPlacement
) -> DraftModel:
    """Read the draft model of a target model.

    Raises:
        ConfigError: if the sizes of their vocabularies differ.
        ModelLoadError, UnsupportedModelError: if the draft model cannot be read.
    """
    config = load_config(source)
    check_vocabulary(source, config, target.shape.vocab_size)
    with open_checkpoint(source) as checkpoint:
        refuse_misfits(checkpoint, check_draft_tensors(checkpoint, config, target.embed.shape[1]))
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
        borrowing = _Borrowing(checkpoint, target, ids)
        longest = min(config.most_positions, target.shape.max_positions)
        model = build_model(borrowing, config, placement, longest)
    return DraftModel(model, None if ids is None else ids.to(placement.device))


class _Borrowing:
    """A checkpoint in which the target's embeddings take the place of missing embeddings."""

    def __init__(self, checkpoint: Checkpoint, target: CausalLM, ids: Tensor | None) -> None:
        self._checkpoint = checkpoint
        self._names = checkpoint.names()
        self._target = target
        self._ids = ids

    def names(self) -> set[str]:
        return self._names

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name in self._names:
            return self._checkpoint.get(name, shape)
        if name == EMBEDDING:
            tensor = self._target.embed
        elif name == HEAD and self._ids is not None:
            tensor = self._embedding(shape[1:])[self._ids]
        else:
            return self._checkpoint.get(name, shape)  # raises, naming what is missing
        if tuple(tensor.shape) != tuple(shape):
            raise ModelLoadError(
                f"the draft model's {name} would be the model's, whose shape is "
                f"{tuple(tensor.shape)} and not {tuple(shape)}"
            )
        return tensor

    def _embedding(self, width: tuple[int, ...]) -> Tensor:
        return self.get(EMBEDDING, (self._target.shape.vocab_size, *width))
