"""`AnswerParser`: turns a model's text into the parts of an answer while it comes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from minserve.chat_formats import ReasoningFormat
from minserve.server.answer.formats import TOOL_PARSERS
from minserve.server.answer.parts import Part, PartList
from minserve.server.answer.reasoning_parser import ReasoningParser
from minserve.server.answer.tool_parser import ToolParser


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """How the text of one request's outputs is to be read.

    Attributes:
        tools: the format of calls, a name of `TOOL_PARSERS`; ``None`` where nothing is called.
        tool_names: the names of the request's tools.
        only_one: an output ends behind its first call.
        reasoning: the markers of thinking; ``None`` for a model that does not think.
        separates: thinking is told apart; else it stays in the content.
        includes: thinking is part of the answer at all, where it is told apart.
        is_open: the prompt ends within the thinking.
        hidden: special tokens that the text shows for the parsers' sake, and that are no content.
    """

    tools: str | None = None
    tool_names: frozenset[str] = frozenset()
    only_one: bool = False
    reasoning: ReasoningFormat | None = None
    separates: bool = True
    includes: bool = True
    is_open: bool = False
    hidden: tuple[str, ...] = ()

    def parser(self) -> AnswerParser:
        """Return a parser for one output."""
        return AnswerParser(self)


class AnswerParser:
    """Reads one output. How its text is cut into pieces changes nothing.

    It never raises, and loses no text but markers and the white space beside them.

    Attributes:
        is_done: nothing that follows matters: there was the one call that was allowed.
        num_calls: calls that have begun.
    """

    def __init__(self, form: AnswerForm) -> None:
        self._out = PartList(form.hidden)
        self._reasoning = (
            None
            if form.reasoning is None or not form.separates
            else ReasoningParser(form.reasoning, self._out, is_open=form.is_open)
        )
        self._tools: ToolParser | None = None
        if form.tools is not None:
            make = partial(TOOL_PARSERS[form.tools], self._out)
            self._tools = make(names=form.tool_names, only_one=form.only_one)

    @property
    def is_done(self) -> bool:
        return self._tools is not None and self._tools.is_done

    @property
    def num_calls(self) -> int:
        return 0 if self._tools is None else self._tools.num_calls

    def feed(self, text: str) -> list[Part]:
        """Return the parts that some more text completes."""
        if self._reasoning is not None:
            text = self._reasoning.feed(text)
        self._answer(text)
        return self._out.take()

    def end(self) -> list[Part]:
        """Return the parts that the end of the output decides."""
        if self._reasoning is not None:
            self._answer(self._reasoning.end())
        if self._tools is not None:
            self._tools.end()
        self._out.end()
        return self._out.take()

    def _answer(self, text: str) -> None:
        """Read text behind the thinking."""
        if not text:
            return
        if self._tools is None:
            self._out.content(text)
        else:
            self._tools.feed(text)
