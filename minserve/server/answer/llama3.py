"""Calls in the form of Llama 3: a JSON object that is the whole answer, perhaps behind a tag."""

from __future__ import annotations

from dataclasses import replace

from minserve.server.answer.grammar import CallRules
from minserve.server.answer.json_call import SPACE, JsonCall
from minserve.server.answer.markers import may_become
from minserve.server.answer.parts import PartList
from minserve.server.answer.tool_parser import State, ToolParser

TAG = "<|python_tag|>"


class Llama3Parser(ToolParser):
    """Reads ``{"name": ..., "parameters": {...}}``, several of them with semicolons between.

    Without a tag an object is a call only where the answer begins with it and it has a tool's name:
    it might be an answer in JSON.
    """

    markers = special_markers = (TAG,)
    can_be_free = False  # calls may begin with nothing that tells them from an answer

    @staticmethod
    def grammar(rules: CallRules) -> str:
        # Llama's templates take one call alone.
        whole = replace(rules, many=False).whole("", "object")
        return "\n".join([*whole, *rules.objects("parameters")])

    def __init__(self, out: PartList, **options: object) -> None:
        super().__init__(out, **options)  # type: ignore[arg-type]  # those of `ToolParser`
        self._state = self._at_start

    def _opened(self, marker: str) -> State:
        return self._before_object

    def _at_start(self, text: str) -> str:
        rest = text.lstrip(SPACE)
        if not rest:
            self._held = text
            return ""
        self._state = self._content
        if rest.startswith("{"):
            self._opening = text[: len(text) - len(rest)]
            self._begin_call(JsonCall(self._names))
            return rest
        return text

    def _behind_call(self, text: str) -> str:
        """Be behind an object, where another one may follow."""
        rest = text.lstrip(SPACE)
        if rest.startswith(";"):
            rest = rest[1:].lstrip(SPACE)
        has_tag = rest.startswith(TAG)
        if has_tag:
            rest = rest[len(TAG) :].lstrip(SPACE)
        if not rest or (not has_tag and may_become(rest, TAG)):
            self._held = text
            return ""
        self._state = self._content
        if rest.startswith("{"):
            self._opening = text[: len(text) - len(rest)]
            self._begin_call(JsonCall(None if has_tag else self._names))
            return rest
        return text
