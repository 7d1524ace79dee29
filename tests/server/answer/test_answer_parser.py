"""Thinking, content and calls are told apart, however the text is cut into pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_templates import BY_NAME

from minserve.chat_formats import REASONING_FORMATS, TOOL_FORMATS
from minserve.engine.text.chat_template import render
from minserve.server.answer.answer_parser import AnswerForm
from minserve.server.answer.formats import TOOL_PARSERS
from minserve.server.answer.parts import Content, Part, Reasoning, ToolArguments, ToolCallBegin

THINK = REASONING_FORMATS["think"]
MARKS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")


def form(tools: str | None = None, **more: Any) -> AnswerForm:
    return AnswerForm(tools=tools, **{"tool_names": frozenset({"f", "g"}), **more})


def parsed(form: AnswerForm, *pieces: str) -> list[Part]:
    """All parts of a text, those of one kind in a row joined, and calls without their ids."""
    parser = form.parser()
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.end()
    joined: list[Any] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, ToolCallBegin):
            assert part.id
            joined.append(part._replace(id=""))
        elif type(last) is type(part) and last[:-1] == part[:-1]:
            joined[-1] = part._replace(text=last.text + part.text)
        else:
            joined.append(part)
    return joined


def call(index: int, name: str, arguments: str) -> list[Part]:
    return [ToolCallBegin(index, "", name), ToolArguments(index, arguments)]


def test_half_of_a_surrogate_pair_makes_no_call() -> None:
    for inner in (
        '{"name": "f", "arguments": "\\ud83d"}',
        '{"name": "\\ud83d", "arguments": {}}',
        '{"name": "f", "\\ud83d": 1, "arguments": {}}',
    ):
        text = f"<tool_call>\n{inner}\n</tool_call>"
        for pieces in ([text], list(text)):
            [part] = parsed(form("hermes"), *pieces)
            assert part == Content(text)
    whole = '{"name": "f", "arguments": "{\\"a\\": \\"\\ud83d\\ude00\\"}"}'
    assert parsed(form("hermes"), f"<tool_call>{whole}") == call(0, "f", '{"a": "😀"}')


# --- as the families' templates write calls ---

CALLS = [
    ("f", {"city": "Köln", "days": [1, 2]}),
    (
        "g",
        {"text": 'a "quoted" {brace} </tool_call> [TOOL_CALLS]\n\\', "deep": {"x": [{"y": None}]}},
    ),
    ("f", {}),
]
WRITTEN_BY = {
    "hermes": ("hermes", "<|im_start|>assistant\n", "<|im_end|>\n"),
    "llama3": ("llama3", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral-list": ("mistral", "", "</s>"),
    "mistral-args": ("mistral", "", "</s>"),
}


@pytest.mark.parametrize("template", WRITTEN_BY)
def test_what_a_template_writes_is_read_back(template: str) -> None:
    name, before, after = WRITTEN_BY[template]
    calls = CALLS[1:2] if template == "llama3" else CALLS
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call{i:05}", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ],
    }
    written = render(BY_NAME[template], [message], {"add_generation_prompt": False})
    text = written.removesuffix(after)[written.index(before) + len(before) :]
    parts = parsed(form(name), *text)
    begins = [part.name for part in parts if isinstance(part, ToolCallBegin)]
    arguments = [json.loads(part.text) for part in parts if isinstance(part, ToolArguments)]
    assert list(zip(begins, arguments, strict=True)) == calls
    assert not any(isinstance(part, Content) for part in parts)


def test_every_format_has_a_parser() -> None:
    assert set(TOOL_PARSERS) == set(TOOL_FORMATS)


# --- texts and what they say ---

EXAMPLES: list[tuple[AnswerForm, str, list[Part]]] = [
    (
        form("hermes", reasoning=THINK),
        "<think>\nhm <tool_call>\n</think>\n\nLet me.\n\n<tool_call>\n"
        '{"name": "f", "arguments": {"a": "}\\"<"}}\n</tool_call>\n<tool_call>\n'
        '{"arguments": {"x":1}, "id": 5, "name": "new"}\n</tool_call>\n bye ',
        [
            Reasoning("hm <tool_call>"),
            Content("Let me."),
            *call(0, "f", '{"a": "}\\"<"}'),
            *call(1, "new", '{"x":1}'),
            Content("bye "),
        ],
    ),
    # Arguments as a text of JSON, or none.
    (
        form("hermes"),
        '<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>'
        '<tool_call>{"name":"f","arguments":null}</tool_call><tool_call>{"name":"g"}</tool_call>',
        [*call(0, "f", '{"a":1}'), *call(1, "f", "{}"), *call(2, "g", "{}")],
    ),
    # What is no call stays content.
    (form("hermes"), '<tool_call>{"name": 5}', [Content('<tool_call>{"name": 5}')]),
    (form("hermes"), "<tool_call>hello</tool_call>", [Content("<tool_call>hello</tool_call>")]),
    (form("hermes"), '<tool_call>{"name": "f"', [Content('<tool_call>{"name": "f"')]),
    (form("hermes"), "a <tool_cal", [Content("a <tool_cal")]),
    (form("hermes"), "a <tool_call>", [Content("a <tool_call>")]),
    (form("hermes"), '{"name": "f", "arguments": {}}', [Content('{"name": "f", "arguments": {}}')]),
    # A call that has begun keeps what there is of it.
    (
        form("hermes"),
        '<tool_call>{"name": "f", "arguments": {"a": [1',
        call(0, "f", '{"a": [1'),
    ),
    (
        form("hermes"),
        '<tool_call>{"name": "f", "arguments": {}}} x',
        [*call(0, "f", "{}"), Content("} x")],
    ),
    (
        form("hermes", only_one=True),
        'a<tool_call>{"name": "f", "arguments": {}}</tool_call>b<tool_call>{"name": "g"}</tool_call>',
        [Content("a"), *call(0, "f", "{}")],
    ),
    (form(), "<tool_call>{}</tool_call> \n", [Content("<tool_call>{}</tool_call> \n")]),
    # Llama 3
    (
        form("llama3"),
        ' {"name": "f", "parameters": {"q": "x; y"}}; {"name": "g", "parameters": {}}',
        [*call(0, "f", '{"q": "x; y"}'), *call(1, "g", "{}")],
    ),
    (
        form("llama3", hidden=MARKS),
        'Well <|python_tag|>{"name": "new", "parameters": {"q": 1}}<|python_tag|>{"name": "f"}',
        [Content("Well"), *call(0, "new", '{"q": 1}'), *call(1, "f", "{}")],
    ),
    (form("llama3", hidden=MARKS), "<|python_tag|>print(1)", [Content("print(1)")]),
    (form("llama3"), '{"name": "Bob", "age": 3}', [Content('{"name": "Bob", "age": 3}')]),
    (form("llama3"), '{"name": "Bob", "age": 3', [Content('{"name": "Bob", "age": 3')]),
    (form("llama3"), "  Hello", [Content("  Hello")]),
    (
        form("llama3"),
        'So: {"name": "f", "parameters": {}}',
        [Content('So: {"name": "f", "parameters": {}}')],
    ),
    # Mistral
    (
        form("mistral", hidden=MARKS),
        'Hi[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}] x',
        [Content("Hi"), *call(0, "f", '{"a": 1}'), *call(1, "g", "{}"), Content("x")],
    ),
    (
        form("mistral", hidden=MARKS),
        '[TOOL_CALLS]f[ARGS]{"a": [1]}[TOOL_CALLS]g.h[CALL_ID]abc123def[ARGS]{}[TOOL_CALLS]i {"q": 1}',
        [*call(0, "f", '{"a": [1]}'), *call(1, "g.h", "{}"), *call(2, "i", '{"q": 1}')],
    ),
    (form("mistral", hidden=MARKS), "[TOOL_CALLS] what? [ARGS]x", [Content(" what? x")]),
    (form("mistral"), "a [TOOL_CALLS] what?", [Content("a [TOOL_CALLS] what?")]),
    (form("mistral", hidden=MARKS), "a [TOOL", [Content("a [TOOL")]),
    (form("mistral"), "[TOOL_CALLS]f[ARGS]", [Content("[TOOL_CALLS]f[ARGS]")]),
    (
        form("mistral"),
        '[TOOL_CALLS]{"name": "f", "arguments": {}}',
        call(0, "f", "{}"),
    ),
    # Thinking
    (form(reasoning=THINK), "<think>a</think>b", [Reasoning("a"), Content("b")]),
    (form(reasoning=THINK), "\n<think>\n\n</think>\n\nb\n", [Content("b\n")]),
    (form(reasoning=THINK), "no <think>a</think>", [Content("no <think>a</think>")]),
    (form(reasoning=THINK), " <thinking>", [Content(" <thinking>")]),
    (form(reasoning=THINK), " <thi", [Content(" <thi")]),
    (form(reasoning=THINK), "<think>a </thi", [Reasoning("a </thi")]),
    (
        form(reasoning=THINK, is_open=True),
        "\na\n\nb\n</think>c",
        [Reasoning("a\n\nb"), Content("c")],
    ),
    (form(reasoning=THINK, is_open=True), "<think>a</think>b", [Reasoning("a"), Content("b")]),
    (form(reasoning=THINK, is_open=True), "a <think> b", [Reasoning("a <think> b")]),
    (form(reasoning=THINK, is_open=True), "<thi", [Reasoning("<thi")]),
    (form(reasoning=THINK, separates=False), "<think>a</think>b", [Content("<think>a</think>b")]),
    (
        form("llama3", reasoning=THINK),
        '<think>a</think>\n\n{"name": "f", "parameters": {}}',
        [Reasoning("a"), *call(0, "f", "{}")],
    ),
    (
        form("mistral", reasoning=REASONING_FORMATS["mistral"], hidden=("[THINK]", "[/THINK]")),
        "[THINK]a[/THINK]b[/THINK]c",
        [Reasoning("a"), Content("bc")],
    ),
]


@pytest.mark.parametrize(("how", "text", "parts"), EXAMPLES)
def test_a_text_has_the_same_parts_wherever_it_is_cut(
    how: AnswerForm, text: str, parts: list[Part]
) -> None:
    assert parsed(how, text) == parts
    assert parsed(how, *text) == parts
    for place in range(1, len(text)):
        assert parsed(how, text[:place], text[place:]) == parts, place


PIECES = st.sampled_from(
    [
        *('{"name": "f", "arguments": {"a": 1}}', '{"name": "f", ', '"parameters"', ": {}", "}"),
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[{"),
        *("<|python_tag|>", "f", "\n", " ", ";", ",", "[", "]", '"', "\\", "<", "é"),
    ]
)


@settings(max_examples=300)
@given(
    pieces=st.lists(PIECES, max_size=12),
    tools=st.sampled_from([None, *TOOL_PARSERS]),
    thinks=st.booleans(),
    is_open=st.booleans(),
    hidden=st.sampled_from([(), MARKS]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_any_text_is_read_the_same_in_any_pieces_and_none_of_it_is_lost(
    pieces: list[str],
    tools: str | None,
    thinks: bool,
    is_open: bool,
    hidden: tuple[str, ...],
    cuts: list[int],
) -> None:
    text = "".join(pieces)
    how = form(tools, reasoning=THINK if thinks else None, is_open=is_open, hidden=hidden)
    parts = parsed(how, text)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert parsed(how, *(text[one:next] for one, next in pairwise(places))) == parts
    if not any(isinstance(part, ToolCallBegin) for part in parts):
        # Markers and white space aside, it is all there.
        told = "".join(part.text for part in parts if not isinstance(part, ToolCallBegin))
        assert _bare(told, hidden) == _bare(text, hidden)


def _bare(text: str, hidden: tuple[str, ...]) -> str:
    for mark in (THINK.begin, THINK.end, *hidden):
        text = text.replace(mark, "")
    return "".join(text.split())


def test_a_long_call_takes_time_in_proportion() -> None:
    """Characters are looked at once, however small the pieces: steps are counted, not seconds."""
    parser = form("hermes").parser()
    sizes = [
        sum(len(part.text) for part in parser.feed(piece) if isinstance(part, ToolArguments))
        for piece in ['<tool_call>{"name": "f", "arguments": {"a": "', *["xy"] * 20_000, '"}}']
    ]
    assert set(sizes[1:-1]) == {2}  # nothing waits, so nothing is read again


def test_mistrals_ids_have_nine_letters_and_digits() -> None:
    (begin, _) = form("mistral").parser().feed('[TOOL_CALLS]f[ARGS]{"a": 1}')
    assert isinstance(begin, ToolCallBegin)
    assert len(begin.id) == 9
    assert begin.id.isalnum()
    (begin, _) = form("mistral").parser().feed("[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{")
    assert isinstance(begin, ToolCallBegin)
    assert begin.id == "abc123def"
