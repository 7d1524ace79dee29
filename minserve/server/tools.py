"""The tools of a chat: what a request says of them, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from minserve.errors import InvalidRequestError
from minserve.server.body import brief, convert, refusal
from minserve.server.parameters.forms import AllowedTools, NamedTool, Tool

MAX_TOOLS = 512
# OpenAI takes letters, digits, "_" and "-", and 64 of them; frameworks put servers' names before
# those of tools.
MAX_TOOL_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
# Of a function without parameters.
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}

Mode = Literal["auto", "required"]


class ToolSpec(NamedTuple):
    """One tool: a function that the client can call.

    Attributes:
        parameters: the JSON schema of its arguments, which are an object.
        strict: arguments have to follow the schema wherever the model calls it.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = NO_PARAMETERS
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """Return it in OpenAI's form, which chat templates know."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools that an answer may call.

    Attributes:
        tools: one at least.
        must_call: the answer is a call, or several.
        forced: the only tool that may be called; ``None`` for any.
        parallel: there may be several calls.
        is_parsed: calls are told apart from the text.
    """

    tools: tuple[ToolSpec, ...]
    must_call: bool = False
    forced: str | None = None
    parallel: bool = True
    is_parsed: bool = True

    @property
    def callable(self) -> tuple[ToolSpec, ...]:
        """The tools that may be called."""
        return tuple(one for one in self.tools if self.forced in (None, one.name))


def read_tool_use(given: Mapping[str, Any]) -> ToolUse | None:
    """Return what a body says of tools; ``None`` where nothing is to be called.

    Args:
        given: the values of a body, by name.

    Raises:
        InvalidRequestError: naming the place of what is wrong.
    """
    tools = read_tools(given.get("tools", []))
    choice = given.get("tool_choice", "auto")
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        raise refusal(
            "tool_choice",
            f"must be auto, none, required, or an object that names a function, not {brief(choice)}",
        )
    if not tools:
        if choice not in ("auto", "none"):
            raise refusal("tool_choice", "needs tools")
        return None
    if choice == "none":
        return None
    more = {
        "parallel": given.get("parallel_tool_calls", True),
        "is_parsed": given.get("parse_tool_calls", True),
    }
    if isinstance(choice, str):
        return ToolUse(tools=tools, must_call=choice == "required", **more)
    if not isinstance(choice, dict):
        raise refusal("tool_choice", f"must be a string or an object, not {brief(choice)}")
    if choice.get("type") == "allowed_tools":
        return _allowed(convert(choice, AllowedTools, "tool_choice"), tools, more)
    name = convert(choice, NamedTool, "tool_choice").function.name
    _check_known(name, tools, "tool_choice.function.name")
    return ToolUse(tools=tools, must_call=True, forced=name, **more)


def _allowed(choice: AllowedTools, tools: tuple[ToolSpec, ...], more: dict[str, Any]) -> ToolUse:
    """Return the use of some of the tools: the model hears of no others."""
    names = {one.function.name for one in choice.allowed_tools.tools}
    for name in names:
        _check_known(name, tools, "tool_choice.allowed_tools.tools")
    return ToolUse(
        tools=tuple(one for one in tools if one.name in names),
        must_call=choice.allowed_tools.mode == "required",
        **more,
    )


def _check_known(name: str, tools: tuple[ToolSpec, ...], place: str) -> None:
    if all(one.name != name for one in tools):
        raise InvalidRequestError(
            f"{place}: {brief(name)} is none of the request's tools", "tool_choice"
        )


def read_tools(value: Any) -> tuple[ToolSpec, ...]:
    """Return the tools of a list in OpenAI's form.

    Raises:
        InvalidRequestError: naming the place of what is wrong.
    """
    if not isinstance(value, list):
        raise refusal("tools", f"must be a list, not {brief(value)}")
    if len(value) > MAX_TOOLS:
        raise refusal("tools", f"holds {len(value)} tools, and at most {MAX_TOOLS} are taken")
    tools: dict[str, ToolSpec] = {}
    for i, one in enumerate(value):
        place = f"tools[{i}]"
        function = convert(one, Tool, place).function
        _check_name(function.name, f"{place}.function.name")
        if function.name in tools:
            raise refusal(f"{place}.function.name", f"{brief(function.name)} comes twice")
        # As it was sent: in a schema, null is a value like others.
        parameters = one["function"].get("parameters")
        tools[function.name] = ToolSpec(
            function.name,
            function.description,
            parameters or NO_PARAMETERS,
            bool(function.strict),
        )
    return tuple(tools.values())


def _check_name(name: str, place: str) -> None:
    if len(name) > MAX_TOOL_NAME:
        raise refusal(place, f"has {len(name)} characters, and at most {MAX_TOOL_NAME} are taken")
    if not _NAME.fullmatch(name):
        raise refusal(place, f"must be of letters, digits and any of _.:/-, not {brief(name)}")
