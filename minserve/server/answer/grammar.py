"""Grammars of calls, in llguidance's dialect of Lark, for answers that have to be calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minserve.server.body import refusal
from minserve.server.tools import ToolSpec

# JSON as models were trained to write it. Where white space is free, small models go on with it.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What a rule names a token by; other tokens are named by their ids.
_NAME = re.compile(r"<[^<>\s\[\]]+>")
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """What a grammar of calls has to hold.

    Attributes:
        tools: those that may be called.
        many: there may be several calls.
        freely: text may stand before and between the calls, and there may be none. Only strict
            tools are held to their schemas then.
        mark_ids: markers that are tokens of their own, with their ids.
        template: the chat template, which may tell between two forms of calls.
    """

    tools: Sequence[ToolSpec]
    many: bool = True
    freely: bool = False
    mark_ids: Mapping[str, int] = field(default_factory=dict)
    template: str = ""

    def marker(self, text: str) -> str:
        """Return a marker for a rule: its token, or else its text."""
        token_id = self.mark_ids.get(text)
        if token_id is None:
            return literal(text)
        return text if _NAME.fullmatch(text) else f"<[{token_id}]>"

    def whole(self, begin: str, rest: str, separator: str = "") -> list[str]:
        """Return the rules of a whole output.

        Args:
            begin: the marker that a call begins with; empty where there is none.
            rest: what follows it in a call.
            separator: what stands between two calls.
        """
        if not self.freely:
            marker = f"{self.marker(begin)} " if begin else ""
            more = f" ({separator} call)*" if self.many else ""
            # Behind their thinking, models begin a new line.
            blank = r"BLANK: /[ \n]{1,2}/"
            return [f"start: BLANK? call{more}", f"call: {marker}{rest}", blank]
        repeated = "*" if self.many else "?"
        text = f"TEXT: /(?s:.*)/ & ~/(?s:.*{_escaped(begin)}.*)/"
        if begin in self.mark_ids:
            call = f"call: {self.marker(begin)} {rest}"
            return [f"start: TEXT (call TEXT){repeated}", call, text]
        free = f"free[suffix={literal(begin)}]: /(?s:.*)/"
        return [f"start: call{repeated} TEXT", f"call: free {rest}", free, text]

    def objects(self, arguments: str) -> list[str]:
        """Return the rules of ``object``, a call as a JSON object.

        Args:
            arguments: the key of the arguments.
        """
        rules = ["object: " + " | ".join(f"object_{i}" for i in range(len(self.tools)))]
        for i, tool in enumerate(self.tools):
            head = f'{{"name": {json.dumps(tool.name)}, "{arguments}": '
            rules.append(f'object_{i}: {literal(head)} arguments_{i} "}}"')
        return rules + self.arguments()

    def arguments(self) -> list[str]:
        """Return the rules of ``arguments_0`` and so on, the arguments of each tool."""
        return [f"arguments_{i}: %json {self._schema(one)}" for i, one in enumerate(self.tools)]

    def _schema(self, tool: ToolSpec) -> str:
        schema = tool.parameters if tool.strict or not self.freely else _ANY_OBJECT
        kind = schema.get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            raise refusal("tools", f"the parameters of {tool.name} must be of the type object")
        if "x-guidance" in schema:
            raise refusal(
                "tools",
                f"the parameters of {tool.name} have x-guidance, whose options "
                "are not the request's to set",
            )
        whole = {**schema, **_ANY_OBJECT, "x-guidance": _SPACING}
        return json.dumps(whole, ensure_ascii=False)


def literal(text: str) -> str:
    """Return a text as a rule writes it."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """Return a text for a regular expression of Rust's syntax, between slashes."""
    return "".join(one if one.isalnum() or one in "_<> " else f"\\{one}" for one in text)
