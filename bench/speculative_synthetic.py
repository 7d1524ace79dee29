"""Shapes without weights for `speculative.py`: random ones, and acceptance by chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from minserve import Engine
from minserve.engine.distribution import ACCEPTANCE, Row
from minserve.engine.draft_model import DraftModelProposer
from minserve.engine.sampler import Proposal, SampledToken, Sampler, Verified
from minserve.errors import GenerationError
from minserve.request import Sequence as EngineSequence


def _opt(hidden: int, layers: int, heads: int, vocab: int = 50272) -> dict[str, Any]:
    return {
        "model_type": "opt", "vocab_size": vocab, "max_position_embeddings": 2048,
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
    }  # fmt: skip


def _llama3(hidden: int, layers: int, mlp: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192,
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": mlp, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": tied,
    }  # fmt: skip


# Published shapes, as in their config.json, and a tiny one to try it all on.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _opt(64, 2, 4, vocab=512),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "llama-3.2-1b": _llama3(2048, 16, 8192, tied=True),
    "llama-3.1-8b": _llama3(4096, 32, 14336),
}


class SyntheticSampler(Sampler):
    """Accepts each drafted token with a fixed probability, whatever the models say.

    The real verification runs besides, for its cost. Draws are a function of the request's
    seed and the output position, and thus the same whatever else is in the batch.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def verify(
        self,
        logits: torch.Tensor,
        seqs: list[EngineSequence],
        proposals: Sequence[Proposal | None],
    ) -> list[Verified | GenerationError]:
        """As `Sampler.verify`, but for what is accepted."""
        results = super().verify(logits, seqs, proposals)
        return [
            one if proposal is None or isinstance(one, GenerationError)
            else self._decide(one, seq, proposal.token_ids)
            for one, seq, proposal in zip(results, seqs, proposals, strict=True)
        ]  # fmt: skip

    def _decide(self, real: Verified, seq: EngineSequence, drafted: tuple[int, ...]) -> Verified:
        num = 0
        while num < len(drafted):
            if Row(seq, drafted[:num]).uniform(ACCEPTANCE) >= self._rate:
                break
            num += 1
        accepted = tuple(SampledToken(token, None) for token in drafted[:num])
        return Verified((*accepted, real.tokens[-1]), len(accepted))


class RandomCheckpoint:
    """Random weights of any shape, made where the model will run. Stands in for a file's."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def __enter__(self) -> RandomCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def names(self) -> set[str]:
        """None: nothing is borrowed from another model by its absence here."""
        return {"model.embed_tokens.weight", "lm_head.weight"}

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Float32, normal with the standard deviation of untrained models; norms are 1."""
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape, device=self._device)
        return torch.randn(shape, device=self._device, generator=self._generator).mul_(0.02)


def synthetic_loader(rate: float, device: str) -> Callable[..., Engine]:
    """Makes engines with random weights, whose sampler accepts at this rate."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def open_random(*_: Any, **__: Any) -> RandomCheckpoint:
        return RandomCheckpoint(device)

    def load(target: str, **settings: Any) -> Engine:
        with ExitStack() as stack:
            for module in ("minserve.engine.build", "minserve.models.draft"):
                stack.enter_context(mock.patch(f"{module}.open_checkpoint", open_random))
            engine = Engine(target, **settings)
        if isinstance(engine._core.proposer, DraftModelProposer):
            engine._core.runner.sampler = SyntheticSampler(rate)
        return engine

    return load


def write_shape(folder: Path, shape: str, *, tokenizer: bool) -> Path:
    """A model folder without weights, and with a tokenizer of a few words."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    if tokenizer:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, "<unk>"))
        fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        fast.save_pretrained(folder)
    return folder
