"""The input of a response, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minserve.server.body import brief, refusal
from minserve.server.parameters.responses_forms import InputItem, InputPart

Message = dict[str, Any]
# What each type of item cannot do without, and the fields that belong to it alone.
_REQUIRED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
_FIELDS = {
    "message": {"role", "content", "phase"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
    "reasoning": {"content", "summary", "encrypted_content"},
}
_EVERYWHERE = {"type", "id", "status"}
# How the texts of several items that become one are joined.
_JOINS = {"content": "\n\n", "reasoning_content": "\n"}
_THOUGHTS = ("reasoning_text", "summary_text")


def chat_messages(
    value: str | Sequence[InputItem], instructions: str | None
) -> tuple[list[Message], list[str]]:
    """Return an input as messages in the form of /v1/chat/completions.

    The reasoning, the text and the calls of one answer are items, and become one message. The
    instructions and the system messages at the beginning become one too: most chat templates know
    one, at the beginning.

    Returns:
        The messages, and the names of hints in the items that change nothing.

    Raises:
        InvalidRequestError: naming the place of what is wrong.
    """
    turns = _Turns()
    if instructions:
        turns.system(instructions)
    items = [InputItem(role="user", content=value)] if isinstance(value, str) else value
    for i, item in enumerate(items):
        turns.add(item, i)
    turns.close()
    return turns.messages, list(turns.hints)


class _Turns:
    """Joins items to messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.hints: dict[str, None] = {}  # a set that keeps the order
        self._call_ids: set[str] = set()
        # The last message, while items may still belong to it, and the texts that it will have.
        self._open: Message | None = None
        self._texts: dict[str, list[str]] = {}

    def system(self, text: str) -> None:
        """Append a system message, to the one at the beginning where nothing came since."""
        if not self.messages:
            self._begin("system")
        if self._open is None or self._open["role"] != "system":
            self._append({"role": "system", "content": text})
        else:
            self._texts.setdefault("content", []).append(text)

    def close(self) -> None:
        """Note that nothing more belongs to the last message."""
        if self._open is not None:
            self._open |= {name: _JOINS[name].join(texts) for name, texts in self._texts.items()}
        self._open, self._texts = None, {}

    def add(self, item: InputItem, place: int) -> None:
        """Append an item."""
        where = f"input[{place}]"
        _check_fields(item, where)
        if item.phase is not None:
            self.hints["input.phase"] = None
        match item.type:
            case "message" if item.role == "assistant":
                text = self._text(item.content, f"{where}.content")
                self._text_of_answer("content", text)
            case "message" if item.role == "user":
                text = self._text(item.content, f"{where}.content")
                self._append({"role": "user", "content": text})
            case "message":  # of the system or a developer
                self.system(self._text(item.content, f"{where}.content"))
            case "reasoning":
                self._think(item, place)
            case "function_call":
                self._call(item)
            case "function_call_output":
                self._result(item, place)

    def _append(self, message: Message) -> None:
        self.close()
        self.messages.append(message)

    def _begin(self, role: str) -> None:
        """Append a message to which more items may belong."""
        message: Message = {"role": role, "content": ""}
        self._append(message)
        self._open = message

    def _answer(self) -> Message:
        """Return the assistant's message, a new one where the last message is another's."""
        if self._open is None or self._open["role"] != "assistant":
            self._begin("assistant")
        assert self._open is not None
        return self._open

    def _text_of_answer(self, name: str, text: str) -> None:
        """Append to a text of the assistant's message; behind its content a new message begins."""
        if "content" in self._texts or "tool_calls" in self._answer():
            self._begin("assistant")
        self._texts.setdefault(name, []).append(text)

    def _think(self, item: InputItem, place: int) -> None:
        where = f"input[{place}]"
        if item.encrypted_content:
            self.hints["input.encrypted_content"] = None
        if item.content and item.summary:
            self.hints["input.summary"] = None
        text = self._text(item.content, f"{where}.content", _THOUGHTS) or self._text(
            item.summary, f"{where}.summary", _THOUGHTS
        )
        if text:
            self._text_of_answer("reasoning_content", text)

    def _call(self, item: InputItem) -> None:
        assert item.call_id is not None
        self._call_ids.add(item.call_id)
        self._answer().setdefault("tool_calls", []).append(
            {
                "type": "function",
                "id": item.call_id,
                "function": {"name": item.name, "arguments": item.arguments},
            }
        )

    def _result(self, item: InputItem, place: int) -> None:
        where = f"input[{place}]"
        if item.call_id not in self._call_ids:
            raise refusal(
                f"{where}.call_id",
                f"no function_call before it has the call_id {brief(item.call_id)}; nothing is "
                "stored here, so send the whole conversation as input",
            )
        text = self._text(item.output, f"{where}.output")
        self._append({"role": "tool", "tool_call_id": item.call_id, "content": text})

    def _text(
        self,
        content: str | list[InputPart] | None,
        where: str,
        types: Sequence[str] = ("input_text", "output_text", "refusal"),
    ) -> str:
        """Return a content as one text; its parts are joined with newlines, as those of chats."""
        if content is None or isinstance(content, str):
            return content or ""
        return "\n".join(self._part(part, f"{where}[{i}]", types) for i, part in enumerate(content))

    def _part(self, part: InputPart, where: str, types: Sequence[str]) -> str:
        if part.type not in types:
            raise refusal(f"{where}.type", f"must be one of {', '.join(types)} here")
        for name in ("annotations", "logprobs", "prompt_cache_breakpoint"):
            if getattr(part, name):
                self.hints[f"input.content.{name}"] = None
        field, other = ("refusal", "text") if part.type == "refusal" else ("text", "refusal")
        text = getattr(part, field)
        if text is None:
            raise refusal(f"{where}.{field}", "is required")
        if getattr(part, other) is not None:
            raise refusal(f"{where}.{other}", f"does not belong to a part of type {part.type}")
        return text


def _check_fields(item: InputItem, where: str) -> None:
    for name in _REQUIRED[item.type]:
        value = getattr(item, name)
        if value is None or (name == "call_id" and not value):
            raise refusal(f"{where}.{name}", f"is required in an item of type {item.type}")
    for name in item.__struct_fields__:
        if name in _EVERYWHERE or name in _FIELDS[item.type]:
            continue
        if getattr(item, name) is not None:
            raise refusal(f"{where}.{name}", f"does not belong to an item of type {item.type}")
