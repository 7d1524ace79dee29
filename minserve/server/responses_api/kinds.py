"""Which kinds of items, parts and tools are refused, each with what to do instead.

A field's own check would only say that its value is not supported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args

from minserve.server.body import brief, refusal
from minserve.server.parameters.responses_forms import InputType, PartType

_TEXT_ONLY = "this server reads and writes text only"
_NO_TOOLS = "this server runs no tools; describe a function, and run it yourself"
_PART_ADVICE = dict.fromkeys(("input_image", "input_file", "input_audio"), _TEXT_ONLY)
_ITEM_ADVICE = {"item_reference": "nothing is stored here; send the item itself"}
_OF_TOOLS = "this server runs no tools, and reads calls of functions only; leave it out"
_CHOICES = ("function", "allowed_tools")


def refuse_kinds(body: Mapping[str, Any]) -> None:
    """Check the types of what a body has.

    Args:
        body: a strict JSON object, of which nothing else has been checked.

    Raises:
        InvalidRequestError: naming the place of a type that is not supported, and saying what to
            do instead.
    """
    for where, item in _objects(body.get("input"), "input"):
        _check(item, where, get_args(InputType), _ITEM_ADVICE, _OF_TOOLS)
        for name in ("content", "output"):
            for place, part in _objects(item.get(name), f"{where}.{name}"):
                _check(part, place, get_args(PartType), _PART_ADVICE)
    for where, tool in _objects(body.get("tools"), "tools"):
        _check(tool, where, ("function",), {}, _NO_TOOLS)
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        _check(choice, "tool_choice", _CHOICES, {}, _NO_TOOLS)


def _objects(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a list, with their places."""
    if isinstance(value, list):
        for i, one in enumerate(value):
            if isinstance(one, dict):
                yield f"{where}[{i}]", one


def _check(
    value: Mapping[str, Any],
    where: str,
    known: Collection[str],
    advice: Mapping[str, str],
    otherwise: str = "",
) -> None:
    kind = value.get("type")
    if isinstance(kind, str) and kind not in known:
        what = advice.get(kind, otherwise)
        raise refusal(f"{where}.type", f"{brief(kind)} is not supported" + (what and f"; {what}"))
