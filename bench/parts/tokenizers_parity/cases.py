"""The vocabularies that are compared, each with its reference.

A reference is what the form's own library makes of the same file, without any of minserve's code:
`tokenizers` for tokenizer.json and for byte-level BPE as the models' tokenizer.json has it,
`sentencepiece` for tokenizer.model and for a GGUF file made of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from minserve.models.finding.source import find_model
from minserve.models.gguf_files.gguf_file import GGUFFile
from parts.tokenizers_parity import vocabularies as made

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class VocabularyCase:
    """A vocabulary.

    Attributes:
        path: its folder or GGUF file.
        reference: the token ids of a text, without special tokens around it.
        before: ids that belong before a text.
        after: ids that belong behind it.
    """

    name: str
    path: Path
    reference: Encode
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def make_cases(folder: Path) -> list[VocabularyCase]:
    """Write all vocabularies into a folder, and take SmolLM2's real one where it is installed."""
    return [*_models(folder), *_files(folder), *_byte_level(folder), *_ggufs(folder)]


def _pieces(style: str, special: dict[str, int], text: str) -> list[int]:
    """Return the tokens by sentencepiece; special tokens that are written out are cut out first."""
    processor = _processor(style)
    found: list[int] = []
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    for part in re.split(f"({pattern})", text):
        found += [special[part]] if part in special else processor.encode(part) if part else []
    return found


@cache
def _processor(style: str) -> Any:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(made.sentencepiece_model(style))
    return processor


def _rust(tokenizer: RustTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
_GEMMA = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
_LLAMA = {"tokenizer_class": "LlamaTokenizer"}


def _models(folder: Path) -> list[VocabularyCase]:
    """Return folders with tokenizer.model alone."""
    more = {**_SPECIAL, "<pad>": made.SPM_SIZE}
    rows: list[tuple[str, str, dict[str, Any], dict[str, Any], Encode]] = [
        ("toolllama", "llama", _LLAMA, {}, partial(_pieces, "llama", _SPECIAL)),
        (
            "vicuna",
            "llama",
            _LLAMA | {"add_bos_token": True},
            {"added_tokens": {"<pad>": made.SPM_SIZE}},
            partial(_pieces, "llama", more),
        ),
        ("openllama", "openllama", _LLAMA, {}, partial(_pieces, "openllama", _SPECIAL)),
        (
            "llama-2-new",
            "llama",
            _LLAMA | {"legacy": False},
            {},
            partial(_rust, made.llama_tokenizer_json("llama", legacy=False)),
        ),
    ]
    found = [
        VocabularyCase(
            f"tokenizer.model {name}",
            made.sentencepiece_folder(folder / f"model-{name}", style, settings, **files),
            reference,
            before=(1,),
        )
        for name, style, settings, files, reference in rows
    ]
    settings = {"tokenizer_class": "GemmaTokenizer"}
    gemma = made.sentencepiece_folder(folder / "model-gemma", "gemma", settings)
    reference = partial(_pieces, "gemma", _GEMMA)
    return [*found, VocabularyCase("tokenizer.model gemma", gemma, reference, before=(2,))]


def _files(folder: Path) -> list[VocabularyCase]:
    """Return folders with a tokenizer.json that some release of transformers does not obey."""
    found = []
    for name, legacy, settings in (
        ("llama-2", True, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
        ("tinyllama", False, {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
        ("eos", True, {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}),
    ):
        file = made.llama_tokenizer_json("llama", legacy=legacy)
        path = made.json_folder(folder / f"json-{name}", file, settings)
        reference = partial(_rust, RustTokenizer.from_file(str(path / "tokenizer.json")))
        after = (2,) if "add_eos_token" in settings else ()
        found.append(VocabularyCase(f"tokenizer.json {name}", path, reference, (1,), after))
    return found


def _byte_level(folder: Path) -> list[VocabularyCase]:
    """Return folders with byte-level BPE."""
    ids = {token: i for i, token in enumerate(made.SPECIAL)}
    llama3 = made.byte_level_bpe("llama-bpe")
    llama3.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    smollm = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>"}
    distilled = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "unk_token": None}
    qwen2 = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"}
    opt = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    opt |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    rows = [
        ("tokenizer.json llama-3", llama3, {"tokenizer_class": "PreTrainedTokenizerFast"}, ["<s>"]),
        ("tokenizer.json smollm2", made.byte_level_bpe("smollm"), smollm, []),
        ("tokenizer.json deepseek-r1-distill", made.byte_level_bpe("qwen2"), distilled, ["<s>"]),
        ("tokenizer.json qwen2", made.byte_level_bpe("qwen2"), qwen2, []),
    ]
    found = []
    for name, tokenizer, settings, before in rows:
        path = made.json_folder(folder / name.replace(" ", "-"), tokenizer, settings)
        reference = partial(_rust, RustTokenizer.from_file(str(path / "tokenizer.json")))
        found.append(VocabularyCase(name, path, reference, tuple(ids[token] for token in before)))
    for name, pre, settings, special, before in (
        ("opt", "gpt-2", opt, ["</s>"], (ids["</s>"],)),
        ("qwen2", "qwen2", qwen2, ["<|im_end|>", "<|endoftext|>"], ()),
    ):
        path = made.merges_folder(folder / f"merges-{name}", settings)
        reference = partial(_rust, made.byte_level_bpe(pre, special))
        found.append(VocabularyCase(f"vocab.json {name}", path, reference, before))
    return found


def _ggufs(folder: Path) -> list[VocabularyCase]:
    """Return GGUF files."""
    llama = made.sentencepiece_gguf(folder / "llama.gguf", "llama")
    gemma = made.sentencepiece_gguf(
        folder / "gemma.gguf",
        "gemma",
        add_space_prefix=False,
        bos_token_id=2,
        eos_token_id=1,
        unk_token_id=3,
    )
    found = [
        VocabularyCase("GGUF llama", llama, partial(_pieces, "llama", _SPECIAL), before=(1,)),
        VocabularyCase("GGUF gemma", gemma, partial(_pieces, "gemma", _GEMMA), before=(2,)),
    ]
    for pre in made.PUBLISHED:
        path = made.byte_level_gguf(folder / f"{pre}.gguf", pre, bos_token_id=3, eos_token_id=2)
        before = (3,) if pre == "llama-bpe" else ()
        reference = partial(_rust, made.byte_level_bpe(pre))
        found.append(VocabularyCase(f"GGUF {pre}", path, reference, before))
    smollm2 = find_model("smollm2").gguf_file
    assert smollm2 is not None, "the embedded model is a GGUF file"
    metadata = GGUFFile(smollm2).metadata
    tokens, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == made.CONTROL]
    real = made.assemble("smollm", tokens, [tuple(merge.split(" ")) for merge in merges], special)
    return [*found, VocabularyCase("GGUF smollm2 (real)", smollm2, partial(_rust, real))]
