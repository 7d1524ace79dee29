"""`TemplateFacts`: what a chat template knows, found by its text and by trying it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minserve.errors import InvalidRequestError

_PROBE = "minserve_probe"
_USER = {"role": "user", "content": "Hello"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}
# Of nine letters and digits, which Mistral's templates insist on.
_CALL_ID = "probe0001"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """What there is to know of a chat template.

    Attributes:
        text: the template; empty where the model has none.
        variables: all names that it reads, its own included.
        shows_tools: it writes the tools into the prompt.
        shows_calls: it writes an assistant's calls, and their results.
        wants_text: it wants a call's arguments as a text, not as an object.
        takes_system: it takes a system message.
    """

    text: str = ""
    variables: frozenset[str] = frozenset()
    shows_tools: bool = False
    shows_calls: bool = False
    wants_text: bool = False
    takes_system: bool = True


def template_facts(text: str, write: Callable[..., str]) -> TemplateFacts:
    """Find out about a template.

    Args:
        write: ``write(messages, **variables)`` writes a conversation by it.
    """
    variables = _variables(text)
    shows_tools = "tools" in variables and _PROBE in (_try(write, [_USER], tools=[_TOOL]) or "")
    as_object = _written_call(write, {_PROBE: "x"}, shows_tools)
    as_text = _written_call(write, '{"minserve_probe": "x"}', shows_tools)
    quoted = f'"{_PROBE}": "x"'
    return TemplateFacts(
        text=text,
        variables=variables,
        shows_tools=shows_tools,
        shows_calls=quoted in as_object or quoted in as_text,
        wants_text=quoted not in as_object and quoted in as_text,
        takes_system=_PROBE in (_try(write, [{"role": "system", "content": _PROBE}, _USER]) or ""),
    )


def _written_call(write: Callable[..., str], arguments: Any, with_tools: bool) -> str:
    """Return a conversation with a call and its result; empty where the template fails on it."""
    call = {
        "id": _CALL_ID,
        "type": "function",
        "function": {"name": "probe", "arguments": arguments},
    }
    messages: list[dict[str, Any]] = [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": _CALL_ID, "name": "probe"},
    ]
    return _try(write, messages, **({"tools": [_TOOL]} if with_tools else {})) or ""


def _try(
    write: Callable[..., str], messages: Sequence[Mapping[str, Any]], **variables: Any
) -> str | None:
    try:
        return write(messages, **variables)
    except InvalidRequestError:
        return None


def _variables(text: str) -> frozenset[str]:
    """Return the names that a template reads; none where jinja cannot read it."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(text).environment.parse(text)
    except Exception:  # of jinja2
        return frozenset()
    return frozenset(one.name for one in tree.find_all(nodes.Name) if one.ctx == "load")
