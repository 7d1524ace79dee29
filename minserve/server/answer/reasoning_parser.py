"""`ReasoningParser`: tells the thinking at the beginning of an answer from the rest of it."""

from __future__ import annotations

from minserve.chat_formats import ReasoningFormat
from minserve.server.answer.markers import may_become, split_at
from minserve.server.answer.parts import PartList


class ReasoningParser:
    """Cuts a text, which comes piece by piece, into thinking and what follows it.

    An answer thinks where it begins with the marker, or where the prompt ends behind one. White
    space beside the markers belongs to neither.

    Attributes:
        is_over: the thinking has ended, or there was none.
    """

    def __init__(self, form: ReasoningFormat, out: PartList, *, is_open: bool) -> None:
        """Begin at the beginning of an answer.

        Args:
            is_open: the prompt ends within the thinking.
        """
        self.is_over = False
        self._form = form
        self._out = out
        self._is_open = is_open
        self._thinks = False
        self._drops_space = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Read on.

        Returns:
            What follows the thinking.
        """
        text, self._held = self._held + text, ""
        if not self.is_over and not self._thinks:
            text = self._begin(text)
        if not self.is_over and self._thinks:
            text = self._think(text)
        if self._drops_space:
            text = text.lstrip()
            self._drops_space = not text
        return text if self.is_over else ""

    def end(self) -> str:
        """Note the end of the output.

        Returns:
            What waited to be decided and is no thinking.
        """
        held, self._held = self._held, ""
        if self.is_over:
            return ""
        if self._thinks or self._is_open:
            self._out.reasoning(held if self._thinks else held.lstrip())
            return ""
        return held

    def _begin(self, text: str) -> str:
        """Decide whether the answer begins with thinking; return what is to be read then."""
        begin, inner = self._form.begin, text.lstrip()
        if may_become(inner, begin):
            self._held = text
            return ""
        if inner.startswith(begin):
            self._thinks = self._drops_space = True
            return inner[len(begin) :]
        self._thinks = self._is_open
        self.is_over = not self._thinks
        return inner if self._thinks else text

    def _think(self, text: str) -> str:
        if self._drops_space:
            text = text.lstrip()
            if not text:
                return ""
            self._drops_space = False
        thought, marker, rest = split_at(text, (self._form.end,))
        visible = thought.rstrip()
        self._out.reasoning(visible)
        if not marker:
            # The marker may follow the white space at the end.
            self._held = text[len(visible) :]
            return ""
        self.is_over = self._drops_space = True
        return rest
