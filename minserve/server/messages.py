"""The messages of a chat, as chat templates take them."""

from __future__ import annotations

from typing import Any

from minserve.errors import InvalidRequestError
from minserve.server.body import MAX_NAME, brief, read_json, refusal
from minserve.server.parameters.forms import ROLES, CalledFunction, Message, TextPart

# OpenAI's later and earlier names of roles that chat templates know.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
# Roles whose messages may say nothing: a call of a tool, or a tool without a result.
_SILENT_ROLES = ("assistant", "tool", "function")
# A message as chat templates take it.
PlainMessage = dict[str, Any]


def plain_messages(messages: list[Message]) -> tuple[list[PlainMessage], list[str]]:
    """Return messages as chat templates take them; the text parts of each joined with newlines.

    Calls have their arguments as an object, where they are the JSON of one.

    Returns:
        The messages, with those of their optional fields that hold something, and the names of
        hints in them that change nothing.

    Raises:
        InvalidRequestError: naming the place of what is wrong.
    """
    plain = []
    hints: dict[str, None] = {}  # a set that keeps the order
    called: dict[str, str] = {}  # the names of tools by the ids of their calls
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if message.role not in ROLES:
            problem = f"must be one of {', '.join(ROLES)}, not {brief(message.role)}"
            raise refusal(f"{place}.role", problem)
        one: PlainMessage = {
            "role": _TEMPLATE_ROLES.get(message.role, message.role),
            "content": _content(message, place, hints),
        }
        optional = {
            "name": message.name or _called_name(message, place, called),
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning_content or message.reasoning,
            "tool_calls": _calls(message, place, called),
        }
        plain.append(one | {name: value for name, value in optional.items() if value})
        if message.annotations:
            hints["messages.annotations"] = None
        if message.cache_control is not None:
            hints["messages.cache_control"] = None
    return plain, list(hints)


def _calls(message: Message, place: str, called: dict[str, str]) -> list[dict[str, Any]]:
    """Return a message's calls, and note their ids."""
    if message.tool_calls and message.role != "assistant":
        raise refusal(f"{place}.tool_calls", f"does not belong to the role {message.role}")
    calls = []
    for call in message.tool_calls:
        called[call.id] = call.function.name
        function = {"name": call.function.name, "arguments": _arguments(call.function)}
        calls.append({"id": call.id, "type": "function", "function": function})
    return calls


def _arguments(function: CalledFunction) -> Any:
    """Return arguments as an object; as the text that they are where they are no object's JSON.

    A model may have written them wrong, and hears so in the next message.
    """
    arguments = function.arguments
    if isinstance(arguments, dict):
        return arguments
    if not arguments.strip():
        return {}
    try:
        value = read_json(arguments)
    except InvalidRequestError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _called_name(message: Message, place: str, called: dict[str, str]) -> str | None:
    """Return the name of the tool whose result a message is.

    Raises:
        InvalidRequestError: for a result that belongs to no call.
    """
    if message.role != "tool":
        return None
    where = f"{place}.tool_call_id"
    if not message.tool_call_id:
        raise refusal(where, "is required: it names the call that the message answers")
    if message.tool_call_id not in called:
        given = brief(message.tool_call_id[:MAX_NAME])
        raise refusal(where, f"{given} is the id of no call in the messages before")
    return called[message.tool_call_id]


def _content(message: Message, place: str, hints: dict[str, None]) -> str:
    content = message.content
    if content is None and message.refusal is not None:
        return message.refusal
    if content is None and message.role not in _SILENT_ROLES:
        raise refusal(f"{place}.content", "is required")
    if message.refusal:
        hints["messages.refusal"] = None
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_text(p, f"{place}.content[{j}]", hints) for j, p in enumerate(content))


def _text(part: TextPart, place: str, hints: dict[str, None]) -> str:
    for name in ("cache_control", "prompt_cache_breakpoint"):
        if getattr(part, name) is not None:
            hints[f"messages.content.{name}"] = None
    text, other = (part.text, "refusal") if part.type == "text" else (part.refusal, "text")
    if text is None:
        raise refusal(f"{place}.{part.type}", "is required")
    if getattr(part, other) is not None:
        raise refusal(f"{place}.{other}", f"does not belong to a part of type {brief(part.type)}")
    return text
