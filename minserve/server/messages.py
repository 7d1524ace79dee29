"""The messages of a chat, as chat templates take them."""

from __future__ import annotations

from minserve.server.body import brief, refusal
from minserve.server.parameters.forms import ROLES, Message, TextPart

# OpenAI's later and earlier names of roles that chat templates know.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
# Roles whose messages may say nothing: a call of a tool, or a tool without a result.
_SILENT_ROLES = ("assistant", "tool", "function")


def plain_messages(messages: list[Message]) -> tuple[list[dict[str, str]], list[str]]:
    """Return messages as chat templates take them; the text parts of each joined with newlines.

    Returns:
        The messages, with those of their optional fields that hold a text, and the names of hints
        in them that change nothing.

    Raises:
        InvalidRequestError: naming the place of what is wrong.
    """
    plain = []
    hints: dict[str, None] = {}  # a set that keeps the order
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if message.role not in ROLES:
            problem = f"must be one of {', '.join(ROLES)}, not {brief(message.role)}"
            raise refusal(f"{place}.role", problem)
        one = {
            "role": _TEMPLATE_ROLES.get(message.role, message.role),
            "content": _content(message, place, hints),
        }
        optional = {
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning_content or message.reasoning,
        }
        plain.append(one | {name: value for name, value in optional.items() if value})
        if message.annotations:
            hints["messages.annotations"] = None
        if message.cache_control is not None:
            hints["messages.cache_control"] = None
    return plain, list(hints)


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
