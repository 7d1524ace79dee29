"""Vocabularies in every form that models come with, trained on the spot, and texts to try them.

No package ships real ones (SmolLM2's apart), so they are trained on the standard library's
source text, with the options of the models that they stand for, and written as those models'
files are: folders with tokenizer.json, tokenizer.model or vocab.json, and GGUF files.
"""

from __future__ import annotations

import io
import json
import random
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Regex as RustRegex
from tokenizers import Tokenizer as RustTokenizer

MODEL_PROTO: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made there
NUM_CHARACTERS = 400_000
BPE_SIZE, SPM_SIZE = 3000, 2500
# ggml's types of tokens.
NORMAL, CONTROL = 1, 3
PARTS = (
    "Hello world", "The", " quick", "  two  spaces ", "    ", "\t", "\t\t", "\n", "\n\n", "\n\n\n  ",
    "\r\n", "\r", " \n ", "\0", "\x1b[0m", "def f(x):\n    return x", "self.assertEqual(", "import os",
    "12345", "3.14159", "1", "007", "²", "½", "don't", "we'LL", "it'S", "'s", "I'm", "HTTPServer",
    "camelCase", "ünïcödé", "e\u0301", "n\u0303o\u0302", "한국어", "中文字符", "日本語テキスト", "Привет",
    "שלום", "مرحبا", "ไทย", "हिन्दी", "🙂", "👩‍👩‍👧", "🇩🇪", "\u200b", "\u00a0", "\u3000", "▁", "▁▁a", "…", "“q”",
    "<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|endoftext|>",
    "<s", "</s", "<0x0A>", "<|x|>", "a", "b ", " c", "!", "?!", "##", "{}", "://", "#!/bin/sh", "€", "\u017f",
)  # fmt: skip


@cache
def corpus() -> str:
    """Return source text of the standard library."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(found[-1])
        if size > NUM_CHARACTERS:
            break
    return "".join(found)[:NUM_CHARACTERS]


def texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of all kinds: pieces of source, and wild mixtures."""
    rng = random.Random(seed)
    source = corpus()
    found = ["", " ", "  ", "\n", "a", *PARTS]
    while len(found) < count:
        if rng.random() < 0.3:
            start = rng.randrange(len(source))
            found.append(source[start : start + rng.randrange(1, 200)])
        else:
            found.append("".join(rng.choices(PARTS, k=rng.randrange(1, 12))))
    return found[:count]


# ------------------------------------------------------------------------------ sentencepiece


@cache
def sentencepiece_model(style: str) -> bytes:
    """Return a model trained with the options of ``llama``, ``gemma`` or ``openllama``."""
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": SPM_SIZE,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9995,
    }
    if style == "openllama":
        options |= {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    else:
        options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    if style == "gemma":
        turns = ["<start_of_turn>", "<end_of_turn>"]
        options |= {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
        options |= {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
        options["user_defined_symbols"] = [*turns, *("▁" * n for n in range(2, 9)), "\n\n"]
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in corpus().split("\n") if line),
        model_writer=written,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def sentencepiece_folder(
    folder: Path, style: str, settings: dict[str, Any], **files: dict[str, Any]
) -> Path:
    """Write a folder with tokenizer.model, its settings, and more files of JSON by their stems."""
    files = {"tokenizer_config": settings, "config": {"model_type": "llama"}} | files
    write_json(folder, files)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(style))
    return folder


def sentencepiece_gguf(path: Path, style: str, **metadata: Any) -> Path:
    """Write the tokens of a model as a GGUF file, as llama.cpp's converter does."""
    model = MODEL_PROTO.FromString(sentencepiece_model(style))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    # ggml numbers the types of pieces as sentencepiece does.
    writer.add_token_types([piece.type for piece in model.pieces])
    return _finish(writer, metadata)


# ------------------------------------------------------------------------------ byte-level BPE

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# How the models' own tokenizer.json cut texts, by the name that GGUF files have for it.
PUBLISHED: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(RustRegex(_LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(RustRegex(_QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>"]


@cache
def _byte_level_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary trained on whole lines, so that merges cross every border of words."""
    bpe = RustTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(RustRegex(r"[^\n]{1,16}|\n+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([corpus()], trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_level_bpe(pre: str, special: Iterable[str] = SPECIAL) -> RustTokenizer:
    """Return a tokenizer with the pre-tokenizer of a family, as its tokenizer.json would have it."""
    vocab, merges = _byte_level_merges()
    return assemble(pre, sorted(vocab, key=vocab.__getitem__), merges, special)


def assemble(
    pre: str, tokens: list[str], merges: list[tuple[str, str]], special: Iterable[str]
) -> RustTokenizer:
    """Return a tokenizer of these tokens with the pre-tokenizer of a family."""
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = RustTokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(PUBLISHED[pre])
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return bpe


def json_folder(
    folder: Path, tokenizer: RustTokenizer, settings: dict[str, Any], **files: dict[str, Any]
) -> Path:
    """Write a folder with tokenizer.json, its settings, and more files of JSON by their stems."""
    files = {"tokenizer_config": settings, "config": {"model_type": "llama"}} | files
    write_json(folder, files)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def merges_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """Write a folder with vocab.json and merges.txt."""
    vocab, merges = _byte_level_merges()
    write_json(
        folder,
        {"vocab": vocab, "tokenizer_config": settings, "config": {"model_type": "opt"}},
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def byte_level_gguf(path: Path, pre: str, **metadata: Any) -> Path:
    """Write the byte-level vocabulary as a GGUF file."""
    vocab, merges = _byte_level_merges()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    return _finish(writer, metadata)


def write_json(folder: Path, files: dict[str, Any]) -> None:
    """Write files of JSON, by their stems, into a new folder."""
    folder.mkdir(parents=True)
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value), encoding="utf-8")


def _finish(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> Path:
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def llama_tokenizer_json(style: str, *, legacy: bool) -> RustTokenizer:
    """Return Llama 2's tokenizer in the form of tokenizer.json, old or new."""
    model = MODEL_PROTO.FromString(sentencepiece_model(style))
    bpe = RustTokenizer(
        models.BPE(
            {piece.piece: i for i, piece in enumerate(model.pieces)},
            list(_merges({piece.piece: piece.score for piece in model.pieces})),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        bpe.normalizer = normalizers.Sequence(steps)
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return bpe


def _merges(scores: dict[str, float]) -> Iterable[tuple[str, str]]:
    """Return every split of a piece into two pieces, the best piece first."""
    ranked = sorted((piece for piece in scores if len(piece) > 1), key=scores.get, reverse=True)
    for piece in ranked:
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]
