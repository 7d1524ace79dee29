"""Calls in the form of Hermes, Qwen2.5, Qwen3 and SmolLM3: ``<tool_call>`` around JSON objects."""

from __future__ import annotations

from minserve.server.answer.grammar import CallRules
from minserve.server.answer.json_call import SPACE
from minserve.server.answer.markers import may_become
from minserve.server.answer.tool_parser import State, ToolParser

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """Reads ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of times."""

    markers = (BEGIN,)
    special_markers = (BEGIN, END)

    @staticmethod
    def grammar(rules: CallRules) -> str:
        rest = f'"\\n" object "\\n" {rules.marker(END)}'
        whole = rules.whole(BEGIN, rest, separator='"\\n"')
        return "\n".join([*whole, *rules.objects("arguments")])

    def _opened(self, marker: str) -> State:
        return self._before_object

    def _behind_call(self, text: str) -> str:
        rest = text.lstrip(SPACE)
        if rest.startswith(END):
            self._state = self._content
            return rest[len(END) :]
        if may_become(rest, END):
            self._held = text
            return ""
        self._state = self._content
        return text
