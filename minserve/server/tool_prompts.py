"""Tools in conversations whose template knows none: described in a message, in the form of Hermes.

The words are those of Qwen2.5's template, which many models were trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from minserve.server.answer.hermes import BEGIN, END
from minserve.server.messages import PlainMessage
from minserve.server.tools import ToolSpec

_ABOUT_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_described_tools(
    messages: Sequence[PlainMessage], tools: Sequence[ToolSpec], *, takes_system: bool
) -> list[PlainMessage]:
    """Return messages without calls and results of their own, but written out in their texts.

    Args:
        tools: those that a system message is to describe; perhaps none.
        takes_system: there may be a system message; else the first message describes the tools.
    """
    written = list(_written(messages))
    if not tools:
        return written
    lines = "\n".join(json.dumps(one.for_template(), ensure_ascii=False) for one in tools)
    text = _ABOUT_TOOLS.format(tools=lines)
    first = written[0]
    if first["role"] == "system":
        return [{**first, "content": _joined(first["content"], text)}, *written[1:]]
    if takes_system:
        return [{"role": "system", "content": text}, *written]
    return [{**first, "content": _joined(text, first["content"])}, *written[1:]]


def _written(messages: Sequence[PlainMessage]) -> Iterable[PlainMessage]:
    """Yield messages with calls and results as texts; results in a row are one message."""
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        if calls := message.get("tool_calls"):
            others = {name: value for name, value in message.items() if name != "tool_calls"}
            text = "\n".join(_call(one["function"]) for one in calls)
            yield {**others, "content": "\n".join(filter(None, (message["content"], text)))}
        else:
            yield message
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _call(function: dict[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{BEGIN}\n{json.dumps(call, ensure_ascii=False)}\n{END}"


def _joined(one: str, other: str) -> str:
    return "\n\n".join(filter(None, (one, other)))
