"""Models of published shapes with random weights: speed hardly depends on the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import torch

from minserve.models.tensor_part import TensorPart
from minserve.models.weights.checkpoint import Checkpoint, TensorHeader


def _opt(hidden: int, layers: int, heads: int, vocab: int = 50272) -> dict[str, Any]:
    return {
        "model_type": "opt", "vocab_size": vocab, "max_position_embeddings": 2048,
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
    }  # fmt: skip


def _llama3(
    hidden: int,
    layers: int,
    mlp: int,
    heads: int = 32,
    kv_heads: int = 8,
    *,
    vocab: int = 128256,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocab, "max_position_embeddings": 8192,
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": tied,
    }  # fmt: skip


# Published shapes, as in their config.json, and tiny shapes for trials.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _opt(64, 2, 4, vocab=512),
    "tiny-llama": _llama3(64, 1, 128, 4, 2, vocab=512),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "smollm2-135m": _llama3(576, 30, 1536, 9, 3, vocab=49152, tied=True),
    # The shape of a draft model: two layers of SmolLM2, with a head for a part of the vocabulary.
    "draft-2-layers": _llama3(576, 2, 1536, 8, 4, vocab=8192),
    "llama-300m": _llama3(1024, 16, 4096, 16, 8, vocab=32000),
    "llama-3.2-1b": _llama3(2048, 16, 8192, tied=True),
    "llama-3.1-8b": _llama3(4096, 32, 14336),
    "llama-3.1-70b": _llama3(8192, 80, 28672, 64),
}


def linear_weights(shape: str) -> int:
    """Return the number of weights that a decode step reads: of all linears, and of the head."""
    values = SHAPES[shape]
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads", heads)
    attention = 2 * hidden * (heads + kv_heads) * (hidden // heads)
    mlp = 2 * values["ffn_dim"] if "ffn_dim" in values else 3 * values["intermediate_size"]
    layers = values["num_hidden_layers"] * (attention + mlp * hidden)
    return layers + values["vocab_size"] * hidden


class RandomCheckpoint(Checkpoint):
    """Random weights of any shape, made on the model's device. It replaces a real checkpoint."""

    def __init__(self, device: str) -> None:
        super().__init__(Path("random weights"), {}, progress=False)
        self._device = device
        self._generator = torch.Generator(device)

    def names(self) -> set[str]:
        """Return the tensor that a draft model would otherwise borrow from its target."""
        return {"model.embed_tokens.weight"}

    def num_parameters(self) -> int:
        """Return more than any machine holds twice, because the real number is not known yet."""
        return 2**60

    def get(
        self, name: str, shape: tuple[int, ...] | None = None, part: TensorPart | None = None
    ) -> torch.Tensor:
        """Return float32 weights, normal with the sd of untrained models; norms are 1."""
        assert shape is not None, "no file tells it"
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape, device=self._device)
        # Whole and by name, so that ranks have parts of the same model.
        self._generator.manual_seed(crc32(name.encode()))
        whole = torch.randn(shape, device=self._device, generator=self._generator).mul_(0.02)
        return whole if part is None or part.is_whole(shape) else part.copy(whole)

    def _header(self, stored: str, file: Path) -> TensorHeader:
        raise NotImplementedError("no tensor is stored")

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        raise NotImplementedError("no tensor is stored")


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Let models be loaded with random weights, made on the device, while the context lasts.

    Args:
        device: ``cuda``, ``cpu``, or ``auto``, as in the engine's settings.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def open_random(*_: Any, **__: Any) -> RandomCheckpoint:
        return RandomCheckpoint(device)

    with ExitStack() as stack:
        for module in ("minserve.engine.build", "minserve.models.draft_model"):
            stack.enter_context(mock.patch(f"{module}.open_checkpoint", open_random))
        # There is nothing to compare with what a model wants.
        for check in ("engine.build.require_tensors", "models.draft_model.check_draft_tensors",
                      "models.draft_model.refuse_misfits"):  # fmt: skip
            stack.enter_context(mock.patch(f"minserve.{check}"))
        yield


def write_words(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer with a word for each id into a model's folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, "t0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def write_shape(folder: Path, shape: str, *, tokenizer: bool) -> Path:
    """Write a model folder without weights, with a tokenizer of a few words if wanted."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    if tokenizer:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, "<unk>"))
        fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        fast.save_pretrained(folder)
    return folder
