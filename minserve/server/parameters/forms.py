"""The forms of parameters that are objects: messages, their parts, and the options of streams."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from minserve.server.body import Form

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

Nothing = tuple[()]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0)]


class StreamOptions(Form):
    """What a stream tells beside its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class TextPart(Form):
    """A part of a message's content: a text, or the assistant's refusal, which is a text as well."""

    type: Literal["text", "refusal"] = "text"
    text: str | None = None
    refusal: str | None = None
    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class Message(Form):
    """A message of a chat. An answer comes back in the next turn with its empty fields."""

    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: Nothing = ()
    annotations: list[dict[str, Any]] | None = None
    cache_control: dict[str, Any] | None = None


Messages = Annotated[list[Message], Meta(min_length=1)]
