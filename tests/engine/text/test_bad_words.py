"""Bad words become the token sequences that would spell them."""

from __future__ import annotations

import pytest

from minserve.engine.text.bad_words import bad_word_ids
from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.load(find_model("smollm2"))


def spelled(tokenizer: Tokenizer, *words: str) -> list[str]:
    found = bad_word_ids(words, tokenizer, tokenizer.vocab_size)
    return sorted(tokenizer.decode(ids, skip_special_tokens=False) for ids in found)


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("Paris", [" Paris", "Paris"]),
        (" Paris", [" Paris", "Paris"]),
        ("the Eiffel Tower", [" the Eiffel Tower", "the Eiffel Tower"]),
        ("\n", ["\n", " \n"]),
        (" ", [" "]),
        ("<|im_end|>", [" <|im_end|>", "<|im_end|>"]),
        ("東京", [" 東京", "東京"]),
    ],
)
def test_a_word_stands_for_itself_and_for_itself_behind_a_space(
    smollm2: Tokenizer, word: str, texts: list[str]
) -> None:
    assert spelled(smollm2, word) == sorted(texts)


def test_a_common_word_is_one_token_and_named_once(smollm2: Tokenizer) -> None:
    found = bad_word_ids(["Paris", " Paris", "Paris"], smollm2, smollm2.vocab_size)
    assert sorted(found) == sorted(tuple(smollm2.encode(t)) for t in ("Paris", " Paris"))
    assert (smollm2.encode(" Paris")[0],) in found


def test_what_the_models_head_cannot_give_is_left_out(smollm2: Tokenizer) -> None:
    (paris,) = smollm2.encode(" Paris")
    assert (paris,) not in bad_word_ids(["Paris"], smollm2, paris)
    assert (paris,) in bad_word_ids(["Paris"], smollm2, paris + 1)
