"""The forms of parameters that are objects: messages, their parts, and the options of streams."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from minserve.server.body import Form

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

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


class FunctionName(Form):
    """The name of a function, where one is chosen."""

    name: str


class NamedTool(Form):
    """The choice of one tool."""

    function: FunctionName
    type: Literal["function"] = "function"


class AllowedToolNames(Form):
    """The choice of some tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=512)]


class AllowedTools(Form):
    """The choice of some tools, in OpenAI's form."""

    allowed_tools: AllowedToolNames
    type: Literal["allowed_tools"] = "allowed_tools"


class Function(Form):
    """A function that the client can call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Form):
    """A tool, which is a function."""

    function: Function
    type: Literal["function"] = "function"


class CalledFunction(Form):
    """A function with the arguments of a call, which are JSON."""

    name: Annotated[str, Meta(min_length=1)]
    arguments: str | dict[str, Any] = ""


class ToolCall(Form):
    """A call in an assistant's message."""

    id: Annotated[str, Meta(min_length=1, max_length=256)]
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Form):
    """A message of a chat. An answer comes back in the next turn with its empty fields."""

    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    annotations: list[dict[str, Any]] | None = None
    cache_control: dict[str, Any] | None = None


Messages = Annotated[list[Message], Meta(min_length=1)]
