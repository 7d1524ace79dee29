"""Calls in the forms of Mistral's models, all behind ``[TOOL_CALLS]``."""

from __future__ import annotations

import re
from dataclasses import replace

from minserve.server.answer.grammar import CallRules, literal
from minserve.server.answer.json_call import SPACE, JsonCall, JsonText
from minserve.server.answer.tool_parser import State, ToolParser, new_short_id

BEGIN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
# What stands between the marker and the arguments, in the newer form.
_HEAD = re.compile(
    r"\s*(?P<name>[\w.:/-]+)\s*(?:\[CALL_ID\]\s*(?P<id>[\w-]+))?\s*(?:\[ARGS\])?\s*", re.ASCII
)
_NO_HEAD = re.compile(r"[^\w.:/\-\[\]\s]", re.ASCII)
_MAX_HEAD = 400


class MistralParser(ToolParser):
    """Reads the older form, a list of objects, and the newer one, names before their arguments.

    ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``, and
    ``[TOOL_CALLS]name[ARGS]{...}`` or ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`` any number of times.
    """

    markers = (BEGIN,)
    special_markers = (BEGIN, ARGUMENTS, CALL_ID)
    new_id = staticmethod(new_short_id)

    _in_list = False
    _arguments = JsonText()

    @staticmethod
    def grammar(rules: CallRules) -> str:
        if ARGUMENTS in rules.template:
            each = " | ".join(
                f"{literal(one.name)} {rules.marker(ARGUMENTS)} arguments_{i}"
                for i, one in enumerate(rules.tools)
            )
            return "\n".join([*rules.whole(BEGIN, f"({each})"), *rules.arguments()])
        more = ' (", " object)*' if rules.many else ""
        whole = replace(rules, many=False).whole(BEGIN, f'" [" object{more} "]"')
        return "\n".join([*whole, *rules.objects("arguments")])

    def _opened(self, marker: str) -> State:
        self._in_list = False
        return self._before_calls

    def _before_calls(self, text: str) -> str:
        """Be behind the marker, where the form is not known yet."""
        rest = text.lstrip(SPACE)
        self._opening += text[: len(text) - len(rest)]
        if not rest:
            return ""
        if rest[0] == "[":
            self._in_list = True
            self._opening += "["
            self._state = self._before_object
            return rest[1:]
        if rest[0] == "{":
            self._begin_call(JsonCall())
        else:
            self._state = self._in_head
        return rest

    def _behind_call(self, text: str) -> str:
        rest = text.lstrip(SPACE)
        if not rest:
            self._held = text
            return ""
        self._state = self._content
        if self._in_list and rest[0] == ",":
            self._opening = ","
            self._state = self._before_object
            return rest[1:]
        if self._in_list and rest[0] == "]":
            return rest[1:]
        return text

    def _in_head(self, text: str) -> str:
        """Be between the marker and the arguments."""
        head, brace, _ = text.partition("{")
        if _NO_HEAD.search(head) or len(head) > _MAX_HEAD:
            self._state = self._content
            opening, self._opening = self._opening, ""
            self.out.content(opening)
            return text
        if not brace:
            self._held = text
            return ""
        found = _HEAD.fullmatch(head)
        if found is None:
            self._state = self._content
            self.out.content(self._opening + head)
            self._opening = ""
            return text[len(head) :]
        self._tell_begin(found["name"], found["id"] or "")
        self._arguments = JsonText()
        self._state = self._in_arguments
        return text[len(head) :]

    def _in_arguments(self, text: str) -> str:
        stop, is_whole = self._arguments.feed(text, 0)
        self.out.arguments(self.num_calls - 1, text[:stop])
        if is_whole:
            self._end_call()
        return text[stop:]
