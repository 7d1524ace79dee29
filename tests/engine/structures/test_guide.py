"""Which tokens a guide allows, beside the sets of texts that the structures stand for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE_S

from minserve.engine.sampling.structure_masks import unpacked
from minserve.engine.structures.compiler import StructureCompiler
from minserve.engine.structures.grammar import GrammarError
from minserve.engine.structures.guide import Guide, mask_bytes
from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model
from minserve.structure import Structure

VOCAB = 512  # more than the tokenizer has, as padded models are
# Texts with common beginnings, with characters that mean something in a regex, and of many bytes.
CHOICES = [
    "the quick",
    "the quick brown",
    "the",
    "then?",
    "1+1=2",
    "a|b\\.*[x]{1}/",
    "Grüße",
    "東京\n",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.load(find_model(str(tiny_llama_dir)))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> StructureCompiler:
    return StructureCompiler(tokenizer, VOCAB)


@pytest.fixture(scope="module")
def end(tokenizer: Tokenizer) -> int:
    (eos,) = tokenizer.eos_token_ids
    return eos


def started(compiler: StructureCompiler, structure: Structure) -> Guide:
    guide = compiler.guide(structure)
    guide.wait(PATIENCE_S)
    guide.start()
    return guide


def allowed(
    guide: Guide, ends: Iterable[int], drafted: tuple[int, ...] = (), may_end: bool = True
) -> set[int]:
    mask = np.zeros(mask_bytes(VOCAB), dtype=np.uint8)
    guide.fill(drafted, mask, ends, may_end)
    assert guide.error is None
    bits = np.unpackbits(mask, bitorder="little")
    assert not bits[VOCAB:].any()
    return {int(i) for i in np.flatnonzero(bits)}


def continuing(tokenizer: Tokenizer, texts: Iterable[str], prefix: bytes) -> set[int]:
    """The tokens with which one of the texts goes on."""
    wanted = [text.encode() for text in texts]
    tokens = {i: tokenizer.token_bytes(i) for i in range(VOCAB)}
    return {
        i
        for i, token in tokens.items()
        if token
        and i not in tokenizer.mark_ids
        and any(t.startswith(prefix + token) for t in wanted)
    }


@settings(max_examples=30)
@given(choices=st.lists(st.sampled_from(CHOICES), min_size=1, unique=True), data=st.data())
def test_a_choice_allows_the_beginnings_of_its_texts_and_nothing_else(
    compiler: StructureCompiler,
    tokenizer: Tokenizer,
    end: int,
    choices: list[str],
    data: st.DataObject,
) -> None:
    guide, text = started(compiler, Structure.of_choice(choices)), b""
    whole = {one.encode() for one in choices}
    while True:
        expected = continuing(tokenizer, choices, text)
        found = allowed(guide, [end])
        if text in whole or _is_open(choices, text):
            assert found == expected | ({end} if text in whole else set())
        else:  # of a text that has to come, the usual tokens are enough
            assert found
            assert found <= expected
        assert guide.can_end == (text in whole)
        assert guide.is_over == (text in whole and not expected)
        if not expected:
            break
        token = data.draw(st.sampled_from(sorted(expected)))
        # A glance ahead leaves no trace.
        ahead = text + tokenizer.token_bytes(token)
        behind = allowed(guide, [end], (token,))
        guide.advance(token)
        text = ahead
        assert allowed(guide, [end]) == behind


def _is_open(choices: Iterable[str], prefix: bytes) -> bool:
    """Whether the next byte may be one or another."""
    rest = [one.encode()[len(prefix) :] for one in choices if one.encode().startswith(prefix)]
    return len({one[:1] for one in rest}) > 1


def test_drafts_that_break_it_allow_nothing_behind_them(
    compiler: StructureCompiler, tokenizer: Tokenizer, end: int
) -> None:
    guide = started(compiler, Structure.of_choice(["the quick"]))
    good = tuple(tokenizer.encode("the quick", add_special_tokens=False))
    bad = tuple(tokenizer.encode("zebra", add_special_tokens=False))
    assert allowed(guide, [end], good) == {end}
    for drafted in (bad, (*good, bad[0]), (*good[:1], *bad), (end,), (*good, end), (VOCAB - 1,)):
        assert allowed(guide, [end], drafted) == set()
    assert allowed(guide, [end], good[:1]) == {good[1]}


def test_a_guide_that_is_told_late_is_where_the_other_is(
    compiler: StructureCompiler, tokenizer: Tokenizer, end: int
) -> None:
    """So a preempted or lost output goes on: the tokens say all."""
    structure = Structure.of_schema({"type": "object"})
    first, late = started(compiler, structure), compiler.guide(structure)
    for token in tokenizer.encode('{"a": [1, {"b": "the quick', add_special_tokens=False):
        allowed(first, [end], (token,))
        first.advance(token)
        late.advance(token)
        assert not late.can_end
    late.wait(PATIENCE_S)
    late.start()
    assert allowed(first, [end]) == allowed(late, [end])


def test_the_end_is_put_off_where_something_else_may_come(
    compiler: StructureCompiler, tokenizer: Tokenizer, end: int
) -> None:
    guide = started(compiler, Structure("regex", "a|ab"))
    assert end not in allowed(guide, [end])
    guide.advance(tokenizer.encode("a", add_special_tokens=False)[0])
    assert end in allowed(guide, [end])
    assert end not in allowed(guide, [end], may_end=False)
    (b,) = tokenizer.encode("b", add_special_tokens=False)
    assert allowed(guide, [end], (b,), may_end=False) == {end}


def test_what_comes_before_the_structure_is_free(
    compiler: StructureCompiler, tokenizer: Tokenizer, end: int
) -> None:
    structure = Structure.of_choice(["the"], begins_after="</x>")
    guide = started(compiler, structure)
    tokens = tokenizer.encode("so <</x>", add_special_tokens=False)
    for place, token in enumerate(tokens):
        free = allowed(guide, [end], tuple(tokens[:place]))
        assert free == set(range(VOCAB)) - {end}
        assert allowed(guide, [end]) == free
        assert not guide.can_end
        guide.advance(token)
    assert allowed(guide, [end]) == {tokenizer.encode("the", add_special_tokens=False)[0]}


def test_no_token_reaches_from_the_free_part_into_the_structure(
    compiler: StructureCompiler, tokenizer: Tokenizer, end: int
) -> None:
    # "ra" is the marker; tokens such as "rain" would hide the beginning of the structure.
    guide = started(compiler, Structure.of_choice(["the"], begins_after="ra"))
    tokens = {i: tokenizer.token_bytes(i) for i in range(VOCAB)}
    bad = {i for i, token in tokens.items() if token.partition(b"ra")[2].strip()}
    assert bad, "the vocabulary has such a token"
    assert allowed(guide, [end]) == set(range(VOCAB)) - {end} - bad
    (r,) = tokenizer.encode("r", add_special_tokens=False)
    worse = {i for i, token in tokens.items() if token.startswith(b"a") and token[1:].strip()}
    assert worse
    assert allowed(guide, [end], (r,)) == set(range(VOCAB)) - {end} - bad - worse


def test_an_output_may_begin_its_free_part_by_a_mark(
    compiler: StructureCompiler, tokenizer: Tokenizer, end: int
) -> None:
    """Models that think or do not: as they please."""
    structure = Structure.of_choice(["the"], begins_after="<|im_end|>", opener="<|im_start|>")
    opener, closer = tokenizer.mark_id("<|im_start|>"), tokenizer.mark_id("<|im_end|>")
    assert opener is not None
    assert closer is not None
    held = {tokenizer.encode("the", add_special_tokens=False)[0]}
    guide = started(compiler, structure)
    assert allowed(guide, [end]) == held | {opener}
    assert allowed(guide, [end], (opener,)) == set(range(VOCAB)) - {end}
    assert allowed(guide, [end], (opener, 300, closer)) == held
    guide.advance(opener)
    assert allowed(guide, [end]) == set(range(VOCAB)) - {end}
    guide.advance(closer)
    assert allowed(guide, [end]) == held
    at_once = started(compiler, structure)
    at_once.advance(min(held))
    assert opener not in allowed(at_once, [end])
    nameless = started(compiler, Structure.of_choice(["the"], begins_after="x", opener="<none>"))
    assert allowed(nameless, [end]) == held


def test_marks_are_no_text_but_can_be_named(
    compiler: StructureCompiler, tokenizer: Tokenizer, end: int
) -> None:
    anything = started(compiler, Structure("regex", r"(.|\n)*"))
    assert allowed(anything, []).isdisjoint(tokenizer.mark_ids)
    named = started(compiler, Structure("lark", 'start: <|im_start|> %json {"type": "integer"}'))
    assert allowed(named, [end]) == {tokenizer.mark_id("<|im_start|>")}


VALUES = [None, True, 0, -7, 1.5, "", "the", "ü\n\"\\", [], [1, "a"], {}, {"a": 1}, {"a": "x", "b": [1]}]  # fmt: skip


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "integer", "minimum": 0},
        {"type": ["string", "null"], "maxLength": 3},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 1},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": True}, "additionalProperties": False},
        {"anyOf": [{"const": None}, {"enum": ["the", 0]}]},
        {"oneOf": [{"type": "string"}, {"type": "array"}]},
        {"$ref": "#/$defs/x", "$defs": {"x": {"type": "number", "exclusiveMaximum": 1.5}}},
    ],
)
def test_a_schema_takes_what_is_valid_and_refuses_the_rest(
    compiler: StructureCompiler, tokenizer: Tokenizer, schema: Any
) -> None:
    for value in VALUES:
        guide, text = (
            started(compiler, Structure.of_schema(schema)),
            json.dumps(value, ensure_ascii=False),
        )
        for token in tokenizer.encode(text, add_special_tokens=False):
            if token not in allowed(guide, []):
                break
            guide.advance(token)
        else:
            assert guide.can_end == jsonschema.Draft202012Validator(schema).is_valid(value)
            continue
        assert not jsonschema.Draft202012Validator(schema).is_valid(value), value


def test_spaces_are_allowed_but_not_without_end(
    compiler: StructureCompiler, tokenizer: Tokenizer
) -> None:
    guide = started(compiler, Structure.of_json())
    guide.advance(tokenizer.encode("{", add_special_tokens=False)[0])
    space, line = (tokenizer.encode(one, add_special_tokens=False)[0] for one in (" ", "\n"))
    assert {space, line} <= allowed(guide, [])
    assert not {space, line} & allowed(guide, [], (space,))
    guide.advance(line)
    num = 0
    while space in allowed(guide, []):
        guide.advance(space)
        num += 1
    assert num == 24
    assert line not in allowed(guide, [])
    assert allowed(guide, [])


def test_what_takes_too_long_ends_with_an_error(
    compiler: StructureCompiler, tokenizer: Tokenizer
) -> None:
    """A grammar with ever more ways to read a text."""
    guide = started(compiler, Structure("lark", 'start: e\ne: e e | e e e | e e e e | "a"'))
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    mask = np.zeros(mask_bytes(VOCAB), dtype=np.uint8)
    for _ in range(3000):
        guide.fill((), mask, [], True)
        if guide.error is not None:
            break
        assert mask.any()
        guide.advance(a)
        can_end = guide.can_end
        assert can_end or guide.error is not None
    assert "cannot be held" in (guide.error or "")
    guide.fill((), mask, [0], True)
    assert not mask.any()
    assert not guide.can_end


@pytest.mark.parametrize(
    ("structure", "says"),
    [
        (Structure("regex", "(a"), "unclosed group"),
        (Structure("regex", r"(a)\1"), "backreferences"),
        (Structure("regex", r"[^\s\S]"), "no output at all"),
        (Structure("gbnf", "root ::= other"), "other"),
        (Structure("gbnf", 'first ::= "a"'), "root"),
        (Structure("gbnf", "root ::= " + '"a" ' * 5000), "characters"),
        (Structure("lark", "start: <|nothing|>"), "unknown special token"),
        (Structure.of_schema(False), "no output at all"),
        (Structure.of_schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "nsatisfiable"),
        (Structure.of_schema({"$ref": "#"}), "no output at all"),
        (Structure.of_schema({"$ref": "http://example.com/x"}), "example.com"),
        (Structure.of_schema({"type": "string", "not": {"const": "a"}}), "not"),
        (Structure.of_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Structure.of_schema({"oneOf": [{"type": "string"}, {"minLength": 2}]}), "oneOf"),
        (Structure.of_schema({"type": "string", "format": "no-such"}), "no-such"),
        (Structure.of_schema({"x-guidance": {"lenient": True}, "not": {}}), "x-guidance"),
    ],
)
def test_what_cannot_be_held_is_an_error_that_says_why(
    compiler: StructureCompiler, structure: Structure, says: str
) -> None:
    with pytest.raises(GrammarError, match=says) as caught:
        started(compiler, structure)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_bits_are_unpacked_alike_by_torch_and_numpy() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (3, 20), dtype=np.uint8)
    expected = np.unpackbits(packed, axis=1, count=150, bitorder="little").astype(bool)
    assert torch.equal(unpacked(torch.from_numpy(packed), 150), torch.from_numpy(expected))
