"""Vocabularies run by sentencepiece: added tokens, prefix spaces, broken bytes, many threads."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import AddedToken

from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.engine.text.sentencepiece_backend import (
    PrefixSpace,
    SentencePieceBackend,
    SentencePieceRules,
)
from minserve.engine.text.tokenizer import Tokenizer
from minserve.engine.text.vocabulary import parse_model_proto
from minserve.sampling_params import SamplingParams
from parts.tokenizers_parity import vocabularies as made

NEXT = made.SPM_SIZE
BOS = AddedToken("<s>", special=True, normalized=False)


def backend(
    prefix: PrefixSpace = PrefixSpace.ALWAYS, **added: dict[str, bool]
) -> SentencePieceBackend:
    tokens = {1: BOS}
    for i, (name, flags) in enumerate(added.items()):
        tokens[NEXT + i] = AddedToken(f"<{name}>", normalized=False, **flags)
    model = parse_model_proto("here", made.sentencepiece_model("llama"))
    return SentencePieceBackend(model, SentencePieceRules(prefix, tokens, before=(1,)), "test")


def pieces(tokenizer: SentencePieceBackend, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return "|".join(tokenizer.token_bytes(i).decode() for i in ids)


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        (PrefixSpace.ALWAYS, "self<s>self", " self|<s>| self"),
        (PrefixSpace.FIRST, "self<s>self", " self|<s>|self"),
        (PrefixSpace.FIRST, " self", " self"),
        (PrefixSpace.FIRST, "<s> self", "<s>| self"),
        (PrefixSpace.NEVER, "self<s> self", "self|<s>| self"),
    ],
)
def test_where_a_space_is_put_before_text(prefix, text, expected):
    assert pieces(backend(prefix), text) == expected


@pytest.mark.parametrize("prefix", PrefixSpace)
def test_the_space_put_before_a_text_is_not_in_what_comes_back(prefix):
    tokenizer = backend(prefix)
    for text in ("self", "  self", "<s>self", "é"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if prefix is PrefixSpace.FIRST and text[0] == " ":
            continue  # the text's own first space stands for it
        came_back = tokenizer.decode(ids, skip_special_tokens=False)
        behind_special = prefix is PrefixSpace.ALWAYS
        assert came_back == (text.replace("<s>", "<s> ") if behind_special else text)


@pytest.mark.parametrize("prefix", PrefixSpace)
def test_a_copy_in_another_process_cuts_texts_alike(prefix):
    tokenizer = backend(prefix, left={"lstrip": True}, end={"special": True, "single_word": True})
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in ("self <left> self", "<s>self<end> <end>", "é ▁ \U0001f600", " self"):
        for special in (True, False):
            assert copy.encode(text, special) == tokenizer.encode(text, special)
            ids = tokenizer.encode(text, special)
            assert copy.decode(ids, special) == tokenizer.decode(ids, special)
    assert copy.vocabulary() == tokenizer.vocabulary()
    assert copy.kind == tokenizer.kind


def test_added_tokens_have_their_flags():
    tokenizer = backend(
        PrefixSpace.NEVER,
        left={"lstrip": True},
        right={"rstrip": True},
        word={"single_word": True},
        kept={"special": False},
        gone={"special": True},
    )
    assert pieces(tokenizer, "if <left> if") == "if|<left>| if"
    assert pieces(tokenizer, "if <right> if") == "if| |<right>|if"
    assert "<word>" in pieces(tokenizer, "if <word> if").split("|")
    assert "<word>" not in pieces(tokenizer, "if<word>if").split("|")
    ids = tokenizer.encode("<kept><gone>", add_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<kept>"


def test_the_longest_of_several_added_tokens_is_found():
    tokenizer = backend(PrefixSpace.NEVER, a={}, ab={})
    assert tokenizer.encode("<a><ab>", add_special_tokens=False) == [NEXT, NEXT + 1]


def test_an_added_token_cannot_stand_there_twice():
    model = parse_model_proto("here", made.sentencepiece_model("llama"))
    rules = SentencePieceRules(PrefixSpace.NEVER, {1: BOS, NEXT: BOS})
    with pytest.raises(ValueError, match="twice"):
        SentencePieceBackend(model, rules, "test")


def test_bytes_that_are_no_character_are_replaced_one_at_a_time():
    tokenizer = backend(PrefixSpace.NEVER)
    broken, a = 3 + 0xE9, tokenizer.encode("a", add_special_tokens=False)[0]
    assert tokenizer.decode([a, broken, a], skip_special_tokens=True) == "a\ufffda"
    assert tokenizer.decode([-1, a, 10**6], skip_special_tokens=True) == "a"


def test_streamed_text_is_the_whole_text_after_any_prompt():
    tokenizer = Tokenizer(backend())
    params = SamplingParams(skip_special_tokens=True)
    for prompt in ("", "<s>", "<s> def f(", "é"):
        for text in made.texts(200, seed=3):
            before = tokenizer.encode(prompt, add_special_tokens=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
            detokenizer = IncrementalDetokenizer(tokenizer.decode, before, params)
            streamed = "".join(detokenizer.add([i])[0] for i in ids) + detokenizer.flush()
            assert tokenizer.decode(before) + streamed == tokenizer.decode(before + ids)


def test_long_texts_give_the_same_tokens_in_many_threads():
    tokenizer = backend(long={})
    text = "<long>" + "".join(made.texts(100, seed=4))
    expected = tokenizer.encode(text, add_special_tokens=False) * 20
    long = text * 20
    assert len(long) > 10_000

    def works(_: int) -> bool:
        ids = tokenizer.encode(long, add_special_tokens=False)
        return ids == expected and tokenizer.decode(ids, True) == tokenizer.decode(expected, True)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(works, range(12)))


def test_a_file_that_is_no_model_is_named():
    from minserve.errors import ModelLoadError

    with pytest.raises(ModelLoadError, match=r"x/tokenizer\.model: is no sentencepiece model"):
        parse_model_proto("x/tokenizer.model", b"\x0a\xff\xff\xff\xff")
