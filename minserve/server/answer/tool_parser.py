"""`ToolParser`: what the parsers of all formats of tool calls have in common."""

from __future__ import annotations

import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

from minserve.server.answer.grammar import CallRules
from minserve.server.answer.json_call import SPACE, JsonCall
from minserve.server.answer.markers import split_at
from minserve.server.answer.parts import PartList

# A state takes text, and returns what of it the next state has to look at. What it cannot decide
# yet it keeps in `_held`.
State = Callable[[str], str]
_SHORT_ID = string.ascii_letters + string.digits


def new_call_id() -> str:
    """Return an id for a call, in the form of OpenAI's."""
    return f"call_{secrets.token_hex(12)}"


def new_short_id() -> str:
    """Return an id of nine letters and digits, as Mistral's templates want them."""
    return "".join(secrets.choice(_SHORT_ID) for _ in range(9))


class ToolParser(ABC):
    """Finds the calls in a text that comes piece by piece; all other text is content.

    How the text is cut into pieces changes nothing. A call that cannot be read stays content.

    Attributes:
        special_markers: what the format writes between texts, which may be special tokens.
        can_be_free: a grammar can hold calls to their schemas where the model may also answer.
        num_calls: calls that have begun.
        is_done: nothing that follows matters: there was the one call that was allowed.
    """

    markers: Collection[str] = ()
    special_markers: Collection[str] = ()
    can_be_free = True
    new_id: Callable[[], str] = staticmethod(new_call_id)

    def __init__(
        self,
        out: PartList,
        *,
        names: Collection[str] = (),
        only_one: bool = False,
    ) -> None:
        """Begin at the beginning of an answer.

        Args:
            out: where the parts go.
            names: the names of the tools.
            only_one: end behind the first call.
        """
        self.out = out
        self.num_calls = 0
        self.is_done = False
        self._names = names
        self._only_one = only_one
        self._held = ""
        # The text of a call under way that is content if the call turns out to be none.
        self._opening = ""
        self._call = JsonCall()
        self._state: State = self._content

    def feed(self, text: str) -> None:
        """Read on."""
        text, self._held = self._held + text, ""
        while text and not self.is_done:
            text = self._state(text)

    def end(self) -> None:
        """Note the end of the output: what waited to be decided is content."""
        if self.is_done:
            return
        if self._state == self._in_call and not self._call.begun:
            self._give_up()
        self.out.content(self._opening + self._held)
        self._opening = self._held = ""
        self.out.end()

    @staticmethod
    @abstractmethod
    def grammar(rules: CallRules) -> str:
        """Return the grammar of an output that calls tools in this format."""

    @abstractmethod
    def _opened(self, marker: str) -> State:
        """Return the state behind a marker that was found in content."""

    def _content(self, text: str) -> str:
        """Be in content, and look for the markers."""
        before, marker, rest = split_at(text, self.markers)
        self.out.content(before)
        if not marker:
            self._held = rest
            return ""
        self._opening = marker
        self._state = self._opened(marker)
        return rest

    def _before_object(self, text: str) -> str:
        """Be where the object of a call has to begin, perhaps behind white space."""
        rest = text.lstrip(SPACE)
        self._opening += text[: len(text) - len(rest)]
        if rest:
            self._begin_call(JsonCall())
        return rest

    def _begin_call(self, call: JsonCall) -> None:
        """Read an object next, which is a call."""
        self._call, self._state = call, self._in_call

    def _in_call(self, text: str) -> str:
        """Be in the object of a call."""
        call, had_begun = self._call, self._call.begun
        rest = call.feed(text)
        if call.begun:
            if not had_begun:
                self._tell_begin(call.name)
            self.out.arguments(self.num_calls - 1, call.take_arguments())
        if call.ended or (call.broken and call.begun):
            self._end_call()
        elif call.broken:
            self._give_up()
        return rest

    def _tell_begin(self, name: str, call_id: str = "") -> None:
        self._opening = ""
        self.out.begin(self.num_calls, call_id or self.new_id(), name)
        self.num_calls += 1

    def _end_call(self) -> None:
        """Note the end of a call."""
        self.out.boundary()
        self.is_done = self._only_one
        self._state = self._behind_call

    @abstractmethod
    def _behind_call(self, text: str) -> str:
        """Be behind the object of a call."""

    def _give_up(self) -> None:
        """Take the text of what is no call for content."""
        text, self._opening = self._opening + self._call.raw, ""
        self._call = JsonCall()
        self._state = self._content
        self.out.content(text)
