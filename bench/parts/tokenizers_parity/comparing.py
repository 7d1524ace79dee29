"""What is compared between a tokenizer and its reference, for one text."""

from __future__ import annotations

import unicodedata

from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.engine.text.tokenizer import Tokenizer
from minserve.sampling_params import SamplingParams
from parts.tokenizers_parity.cases import VocabularyCase

_PLAIN = SamplingParams(skip_special_tokens=False)
# Vocabularies that change a text before they cut it, as their models' own files do.
_CHANGES = ("openllama", "qwen2", "deepseek")


def mismatches(case: VocabularyCase, tokenizer: Tokenizer, text: str) -> list[str]:
    """Return what differs, in words; nothing where all agrees."""
    found = []
    expected = case.reference(text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids != expected:
        found.append(f"{case.name}: {text!r} has the tokens {expected}, not {ids}")
    around = tokenizer.encode(text)
    if around != [*case.before, *expected, *case.after]:
        found.append(f"{case.name}: {text!r} with special tokens has the tokens {around}")
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    if not _is_text_of(decoded, text) and not any(word in case.name for word in _CHANGES):
        found.append(f"{case.name}: {text!r} comes back as {decoded!r}")
    streamed = _stream(tokenizer, around)
    if streamed != tokenizer.decode(around, skip_special_tokens=False):
        found.append(f"{case.name}: {text!r} is streamed as {streamed!r}")
    return found


def _is_text_of(decoded: str, text: str) -> bool:
    """Return whether a decoded text is the original, but for what sentencepiece cannot keep.

    It has one sign for a space and for itself, and its models put a space behind special tokens.
    """
    plain = [unicodedata.normalize("NFC", t.replace("▁", " ")) for t in (decoded, text)]
    return plain[0] == plain[1] or plain[0].replace(" ", "") == plain[1].replace(" ", "")


def _stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer.decode, [], _PLAIN)
    sent = [detokenizer.add([token])[0] for token in ids]
    return "".join(sent) + detokenizer.flush()
