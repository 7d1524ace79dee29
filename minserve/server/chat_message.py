"""`MessagePieces`: the parts of an answer as the fields of a chat's message, or of a stream's delta."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minserve.server.answer.parts import Content, Part, Reasoning, ToolCallBegin


class _CallText:
    """What is told of one call."""

    __slots__ = ("arguments", "begin")

    def __init__(self) -> None:
        self.begin: ToolCallBegin | None = None
        self.arguments: list[str] = []

    def value(self) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": "".join(self.arguments)}
        if self.begin is None:
            return {"function": function}
        function = {"name": self.begin.name, **function}
        return {"id": self.begin.id, "type": "function", "function": function}


class MessagePieces:
    """Parts of one answer, all of them or those of a chunk."""

    def __init__(self, *, includes_thinking: bool) -> None:
        self._includes_thinking = includes_thinking
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, _CallText] = {}

    def __bool__(self) -> bool:
        return bool(self._texts or self._thoughts or self._calls)

    def add(self, parts: Iterable[Part]) -> None:
        """Append parts."""
        for part in parts:
            if isinstance(part, Content):
                self._texts.append(part.text)
            elif isinstance(part, Reasoning):
                if self._includes_thinking:
                    self._thoughts.append(part.text)
            elif isinstance(part, ToolCallBegin):
                self._calls.setdefault(part.index, _CallText()).begin = part
            else:
                self._calls.setdefault(part.index, _CallText()).arguments.append(part.text)

    def delta(self, *, is_first: bool) -> dict[str, Any]:
        """Return the ``delta`` of a chunk; the role is sent with the first one."""
        fields = self._fields()
        if self._calls:
            fields["tool_calls"] = [
                {"index": index, **call.value()} for index, call in self._calls.items()
            ]
        if not is_first:
            return fields
        # As in OpenAI's first chunks: null before a call.
        empty = {"content": None if fields else ""}
        return {"role": "assistant", **empty, **fields}

    def message(self) -> dict[str, Any]:
        """Return the ``message`` of a whole answer."""
        fields = self._fields()
        if self._calls:
            fields["tool_calls"] = [call.value() for call in self._calls.values()]
        content = None if self._calls else ""
        return {"role": "assistant", "content": content, "refusal": None, **fields}

    def _fields(self) -> dict[str, Any]:
        fields = {"reasoning_content": "".join(self._thoughts), "content": "".join(self._texts)}
        return {name: text for name, text in fields.items() if text}
