"""What a chat template knows is found by trying it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tool_templates import BY_NAME

from minserve.chat_formats import find_reasoning_format, find_tool_format
from minserve.engine.text.backend import RustBackend
from minserve.engine.text.template_facts import TemplateFacts
from minserve.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def backend(tiny_llama_dir: Path) -> RustBackend:
    return RustBackend(RustTokenizer.from_file(str(tiny_llama_dir / "tokenizer.json")))


def facts(backend: RustBackend, template: str | dict[str, str]) -> TemplateFacts:
    return Tokenizer(backend, chat_template=template).template_facts(with_tools=True)


@pytest.mark.parametrize(
    ("template", "knows"),
    [
        ("hermes", {"tools", "calls", "system"}),
        ("hybrid", {"tools", "calls", "system"}),
        ("llama3", {"tools", "calls", "system"}),
        ("mistral-list", {"tools", "calls", "system"}),
        ("mistral-args", {"tools", "calls", "system"}),
        ("always-thinking", {"calls", "text", "system"}),
        ("no-system", set()),
    ],
)
def test_templates_are_tried(template: str, knows: set[str], backend: RustBackend) -> None:
    found = facts(backend, BY_NAME[template])
    assert knows == {
        name
        for name, value in {
            "tools": found.shows_tools,
            "calls": found.shows_calls,
            "text": found.wants_text,
            "system": found.takes_system,
        }.items()
        if value
    }


def test_variables_are_those_that_are_read(backend: RustBackend) -> None:
    found = facts(backend, BY_NAME["hybrid"])
    assert {"enable_thinking", "tools", "messages"} <= found.variables
    assert "reasoning_effort" not in found.variables


def test_a_template_that_fails_knows_nothing(backend: RustBackend) -> None:
    for template in ("{{ raise_exception('no') }}", "{% broken", "{{ tools[0].x.y.z }}"):
        found = facts(backend, template)
        assert (found.shows_tools, found.shows_calls, found.takes_system) == (False,) * 3
    assert facts(backend, {}) == TemplateFacts()
    named = facts(backend, {"default": BY_NAME["no-system"], "tool_use": BY_NAME["hermes"]})
    assert named.shows_tools


def never(text: str) -> bool:
    return text == ""


@pytest.mark.parametrize(
    ("template", "tools", "thinking"),
    [
        ("hermes", ("hermes", False), None),
        ("hybrid", ("hermes", False), "think"),
        ("llama3", ("llama3", False), None),
        ("mistral-list", ("mistral", False), None),
        ("mistral-args", ("mistral", False), None),
        ("always-thinking", ("hermes", True), "think"),
        ("no-system", ("hermes", True), None),
    ],
)
def test_formats_are_told_by_templates(
    template: str, tools: tuple[str, bool], thinking: str | None, backend: RustBackend
) -> None:
    found = facts(backend, BY_NAME[template])
    shows = found.shows_tools
    assert find_tool_format("auto", found.text, shows_tools=shows) == tools
    assert find_tool_format("none", found.text, shows_tools=shows) == (None, False)
    assert find_tool_format("llama3", found.text, shows_tools=shows) == ("llama3", not shows)
    reasoning = find_reasoning_format("auto", found.text, never)
    assert (reasoning and reasoning.name) == thinking
    named = find_reasoning_format("mistral", found.text, never)
    assert named is not None
    assert named.begin == "[THINK]"


def test_thinking_is_told_by_tokens_too() -> None:
    found = find_reasoning_format("auto", "", lambda text: text == "[/THINK]")
    assert found is not None
    assert found.name == "mistral"
