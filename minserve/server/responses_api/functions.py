"""The tools of a response, which are those of a chat in a flatter form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minserve.errors import InvalidRequestError
from minserve.server.body import convert
from minserve.server.parameters.responses_forms import FunctionTool
from minserve.server.tools import ToolUse, read_tool_use


def read_function_use(body: Mapping[str, Any]) -> ToolUse | None:
    """Return what a body says of tools; ``None`` where nothing is to be called.

    Args:
        body: a body whose types of tools are known to be supported.

    Raises:
        InvalidRequestError: naming the place of what is wrong.
    """
    tools = body.get("tools") or []
    if isinstance(tools, list):
        tools = [_nested(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    given = {"tools": tools, "tool_choice": _nested_choice(body.get("tool_choice", "auto"))}
    if (parallel := body.get("parallel_tool_calls")) is not None:
        given["parallel_tool_calls"] = parallel
    try:
        return read_tool_use(given)
    except InvalidRequestError as error:
        raise InvalidRequestError(_flat(str(error)), _flat(error.param or "tools")) from None


def _nested(tool: Any, where: str) -> dict[str, Any]:
    """Return a tool in the form of chats."""
    convert(tool, FunctionTool, where)
    # As it was sent: in a schema, null is a value like others.
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def _nested_choice(choice: Any) -> Any:
    """Return a choice in the form of chats."""
    if not isinstance(choice, dict):
        return choice
    fields = {name: value for name, value in choice.items() if name != "type"}
    if choice.get("type") != "allowed_tools":
        return {"type": choice.get("type", "function"), "function": fields}
    if isinstance(tools := fields.get("tools"), list):
        fields["tools"] = [_nested_choice(one) for one in tools]
    return {"type": "allowed_tools", "allowed_tools": fields}


def _flat(text: str) -> str:
    """Return an error's words about the form of chats for that of responses."""
    return text.replace(".function", "").replace(".allowed_tools", "")
