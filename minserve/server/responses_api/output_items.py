"""The output of a response: its items, and the events that tell of them while they come.

Nothing here knows of engines or of HTTP: parts of an answer go in, and JSON objects come out. The
forms are those of OpenAI's reference: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from minserve.server.answer.parts import Content, Part, Reasoning, ToolArguments, ToolCallBegin
from minserve.server.json_array import JsonArray

# A JSON object with the name of the event as its `type`; only its `sequence_number` is missing.
Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]


class OutputItems:
    """Collects the items of one output."""

    def __init__(self) -> None:
        self._items: list[dict[str, Any]] = []  # those that are complete
        self._open: _Item | None = None

    def add(self, part: Part, logprobs: JsonArray | None = None) -> list[Event]:
        """Append a part of the answer.

        Args:
            logprobs: of the part's tokens, in the chat form; kept for content alone.

        Returns:
            The events that tell of it.
        """
        events: list[Event] = []
        match part:
            case Reasoning(text):
                events += self._text(_ReasoningItem, text)
            case Content(text):
                events += self._text(_MessageItem, text, logprobs)
            case ToolCallBegin():
                events += self._begin(_CallItem(len(self._items) + bool(self._open), part))
            case ToolArguments(_, text):
                assert self._open is not None  # its call has begun
                events.append(self._open.add(text))
        return events

    def end(self, *, complete: bool) -> list[Event]:
        """Note the end of the output, and return the events that tell of it.

        A complete output without a single item gets an empty message.

        Args:
            complete: false where the output broke off, so that its last item may lack something.
        """
        events: list[Event] = []
        if complete and self._open is None and not self._items:
            events += self._begin(_MessageItem(0))
        return events + self._close("completed" if complete else "incomplete")

    def items(self) -> list[dict[str, Any]]:
        """Return the items that are complete; after `end` those are all."""
        return list(self._items)

    def _text(
        self, kind: type[_TextItem], text: str, logprobs: JsonArray | None = None
    ) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._open, kind):
            events += self._begin(kind(len(self._items) + bool(self._open)))
        assert self._open is not None
        return [*events, self._open.add(text, logprobs)]

    def _begin(self, item: _Item) -> list[Event]:
        """Close the item before, and open one."""
        events = self._close("completed")
        self._open = item
        return [*events, *item.opened()]

    def _close(self, status: Status) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        self._items.append(item.value(status))
        return list(item.closed(self._items[-1]))


class _Item(ABC):
    """An item whose text is still coming."""

    prefix: ClassVar[str]

    def __init__(self, index: int) -> None:
        self.place: dict[str, Any] = {
            "item_id": f"{self.prefix}_{uuid.uuid4().hex}",
            "output_index": index,
        }
        self._texts: list[str] = []

    def add(self, text: str, logprobs: JsonArray | None = None) -> Event:
        """Append text, and return the event that tells of it."""
        self._texts.append(text)
        return self._delta(text, logprobs)

    def opened(self) -> Iterator[Event]:
        """Yield the events of its beginning."""
        yield self._of_item("response.output_item.added", self.shell("in_progress"))

    def closed(self, value: dict[str, Any]) -> Iterator[Event]:
        """Yield the events of its end, with its final value."""
        yield self._of_item("response.output_item.done", value)

    @abstractmethod
    def shell(self, status: Status) -> dict[str, Any]:
        """Return the item without its text."""

    @abstractmethod
    def value(self, status: Status) -> dict[str, Any]:
        """Return the item with all text that has come."""

    @abstractmethod
    def _delta(self, text: str, logprobs: JsonArray | None) -> Event:
        """Return the event that tells of some more text."""

    def _of_item(self, name: str, value: dict[str, Any]) -> Event:
        return {"type": name, "output_index": self.place["output_index"], "item": value}

    def _whole(self) -> str:
        return "".join(self._texts)


class _TextItem(_Item):
    """An item with one part of text."""

    event: ClassVar[str]

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.place["content_index"] = 0

    def opened(self) -> Iterator[Event]:
        yield from super().opened()
        yield {"type": "response.content_part.added", **self.place, "part": self.part("")}

    def closed(self, value: dict[str, Any]) -> Iterator[Event]:
        (part,) = value["content"]
        told = {name: part[name] for name in ("text", "logprobs") if name in part}
        yield {"type": f"{self.event}.done", **self.place, **told}
        yield {"type": "response.content_part.done", **self.place, "part": part}
        yield from super().closed(value)

    def value(self, status: Status) -> dict[str, Any]:
        return {**self.shell(status), "content": [self.part(self._whole())]}

    @abstractmethod
    def part(self, text: str) -> dict[str, Any]:
        """Return the item's part with a text."""

    def _delta(self, text: str, logprobs: JsonArray | None) -> Event:
        return {"type": f"{self.event}.delta", **self.place, "delta": text}


class _ReasoningItem(_TextItem):
    """The model's thinking. It is told as it is, so that no summary is needed."""

    prefix = "rs"
    event = "response.reasoning_text"

    def shell(self, status: Status) -> dict[str, Any]:
        return {
            "id": self.place["item_id"],
            "type": "reasoning",
            "summary": [],
            "content": [],
            "status": status,
        }

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}


class _MessageItem(_TextItem):
    """What the model says to the user."""

    prefix = "msg"
    event = "response.output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs = JsonArray()

    def add(self, text: str, logprobs: JsonArray | None = None) -> Event:
        event = super().add(text, logprobs)
        if logprobs is not None:
            self._logprobs.join(logprobs)
        return event

    def shell(self, status: Status) -> dict[str, Any]:
        return {
            "id": self.place["item_id"],
            "type": "message",
            "role": "assistant",
            "content": [],
            "status": status,
        }

    def part(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        return {**part, "logprobs": self._logprobs if text else []}

    def _delta(self, text: str, logprobs: JsonArray | None) -> Event:
        return {**super()._delta(text, logprobs), "logprobs": [] if logprobs is None else logprobs}


class _CallItem(_Item):
    """A call of a tool."""

    prefix = "fc"

    def __init__(self, index: int, call: ToolCallBegin) -> None:
        super().__init__(index)
        self._call = call

    def closed(self, value: dict[str, Any]) -> Iterator[Event]:
        if value["status"] == "completed":  # others are no JSON that could be used
            told = {"name": value["name"], "arguments": value["arguments"]}
            yield {"type": "response.function_call_arguments.done", **self.place, **told}
        yield from super().closed(value)

    def shell(self, status: Status) -> dict[str, Any]:
        return {
            "id": self.place["item_id"],
            "type": "function_call",
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": "",
            "status": status,
        }

    def value(self, status: Status) -> dict[str, Any]:
        return {**self.shell(status), "arguments": self._whole()}

    def _delta(self, text: str, logprobs: JsonArray | None) -> Event:
        return {"type": "response.function_call_arguments.delta", **self.place, "delta": text}
