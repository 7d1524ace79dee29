"""The parts of an answer, and `PartList`, which collects them while a text comes."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from minserve.server.answer.markers import split_at


class Reasoning(NamedTuple):
    """A piece of the model's thinking."""

    text: str


class Content(NamedTuple):
    """A piece of what the model says to the user."""

    text: str


class ToolCallBegin(NamedTuple):
    """The begin of a call.

    Attributes:
        index: 0 for the first call of the answer.
        id: what the tool's result names the call by.
        name: the tool's name.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here
    id: str
    name: str


class ToolArguments(NamedTuple):
    """A piece of a call's arguments, which are JSON as the model wrote it.

    Attributes:
        index: which call it belongs to; that call has begun.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here
    text: str


Part = Reasoning | Content | ToolCallBegin | ToolArguments


class PartList:
    """Parts in the order in which they came; pieces of one thing in a row are joined.

    White space beside a call belongs to the way in which calls are written, and is no content: what
    stands before a call waits until text follows it, and what stands behind one is dropped.
    """

    def __init__(self, hidden: Collection[str] = ()) -> None:
        """Begin an answer.

        Args:
            hidden: special tokens that are left out of the content.
        """
        self._parts: list[Part] = []
        self._hidden = hidden
        self._held = ""
        self._space = ""
        self._drops_space = False

    def take(self) -> list[Part]:
        """Return the parts since the last time."""
        parts, self._parts = self._parts, []
        return parts

    def reasoning(self, text: str) -> None:
        """Append thinking."""
        if text:
            self._join(Reasoning, text)

    def content(self, text: str) -> None:
        """Append content."""
        if not self._hidden:
            self._content(text)
            return
        marker, rest = "x", self._held + text
        while marker:
            before, marker, rest = split_at(rest, self._hidden)
            self._content(before)
        self._held = rest

    def _content(self, text: str) -> None:
        if self._drops_space:
            text = text.lstrip()
        if not text:
            return
        self._drops_space = False
        text = self._space + text
        visible = text.rstrip()
        self._space = text[len(visible) :]
        if visible:
            self._join(Content, visible)

    def begin(self, index: int, call_id: str, name: str) -> None:
        """Append the begin of a call."""
        self.boundary()
        self._parts.append(ToolCallBegin(index, call_id, name))

    def arguments(self, index: int, text: str) -> None:
        """Append arguments of the call that began last."""
        last = self._parts[-1] if self._parts else None
        if isinstance(last, ToolArguments) and last.index == index:
            self._parts[-1] = ToolArguments(index, last.text + text)
        elif text:
            self._parts.append(ToolArguments(index, text))

    def boundary(self) -> None:
        """Note that something stands here that is no content: white space beside it is dropped."""
        self._release()
        self._space, self._drops_space = "", True

    def end(self) -> None:
        """Append what waits for text to follow."""
        self._release()
        if self._space:
            self._join(Content, self._space)
            self._space = ""

    def _release(self) -> None:
        """Append what waited to become a special token."""
        held, self._held = self._held, ""
        self._content(held)

    def _join(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        last = self._parts[-1] if self._parts else None
        if isinstance(last, kind):
            self._parts[-1] = kind(last.text + text)
        else:
            self._parts.append(kind(text))
