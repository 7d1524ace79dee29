"""The forms in which models write thinking and calls of tools, by name, and which one a model has.

`minserve.server.answer` has a parser for each form of calls. Settings name the forms too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class ReasoningFormat(NamedTuple):
    """The markers between which a model thinks."""

    name: str
    begin: str
    end: str


REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    one.name: one
    for one in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    )
}
# With texts one of which is in those chat templates that have their models write calls like this.
TOOL_FORMATS: Mapping[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "llama3": ("<|python_tag|>", '"parameters": dictionary of argument name and its value'),
}
# The form in which the server itself describes tools.
DESCRIBED = "hermes"
AUTO, NONE = "auto", "none"
REASONING_SETTINGS = (AUTO, NONE, *REASONING_FORMATS)
TOOL_SETTINGS = (AUTO, NONE, *TOOL_FORMATS)


class ToolFormat(NamedTuple):
    """How a model calls tools.

    Attributes:
        name: of the form of calls; ``None`` where tools are refused.
        is_described: the chat template knows no tools, or writes calls in an unknown form: the
            server describes the tools in a message, in the form `DESCRIBED`.
    """

    name: str | None
    is_described: bool


def find_tool_format(setting: str, template: str, *, shows_tools: bool) -> ToolFormat:
    """Return how a model calls tools.

    Args:
        setting: one of `TOOL_SETTINGS`.
        template: the chat template of conversations with tools.
        shows_tools: that template writes the tools into the prompt.
    """
    if setting == NONE:
        return ToolFormat(None, False)
    if setting != AUTO:
        return ToolFormat(setting, not shows_tools)
    if shows_tools:
        for name, signs in TOOL_FORMATS.items():
            if any(sign in template for sign in signs):
                return ToolFormat(name, False)
    return ToolFormat(DESCRIBED, True)


def find_reasoning_format(
    setting: str, template: str, is_token: Callable[[str], bool]
) -> ReasoningFormat | None:
    """Return the markers of a model's thinking; ``None`` for a model that does not think.

    Args:
        setting: one of `REASONING_SETTINGS`. With ``none`` the model thinks all the same.
        template: the model's chat template, which may write the markers.
        is_token: whether a text is one token of the model.
    """
    if setting in REASONING_FORMATS:
        return REASONING_FORMATS[setting]
    forms = REASONING_FORMATS.values()
    written = (one for one in forms if one.end in template)
    return next(written, next((one for one in forms if is_token(one.end)), None))
