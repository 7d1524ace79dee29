"""The forms of parameters of /v1/responses that are objects: items, tools, and options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from minserve.server.body import Form

InputRole = Literal["user", "assistant", "system", "developer"]
InputType = Literal["message", "function_call", "function_call_output", "reasoning"]
PartType = Literal["input_text", "output_text", "refusal", "reasoning_text", "summary_text"]
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
_Objects = list[dict[str, Any]]


class InputPart(Form):
    """A part of an item's content: a text. Parts of an answer come back with their empty fields."""

    type: PartType
    text: str | None = None
    refusal: str | None = None
    annotations: _Objects | None = None
    logprobs: _Objects | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class InputItem(Form):
    """An item of the conversation. Which fields it has depends on its type."""

    type: InputType = "message"
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    # of messages
    role: InputRole | None = None
    content: str | list[InputPart] | None = None
    phase: str | None = None
    # of calls and their outputs
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    # of reasoning
    summary: list[InputPart] | None = None
    encrypted_content: str | None = None


Input = str | Annotated[list[InputItem], Meta(min_length=1)]
Metadata = Annotated[
    dict[
        Annotated[str, Meta(max_length=64)],
        Annotated[str, Meta(max_length=512)],
    ],
    Meta(max_length=16),
]


class ReasoningOptions(Form):
    """What is asked of the model's thinking."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class TextFormat(Form):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class TextOptions(Form):
    """What is asked of the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesStreamOptions(Form):
    """What a stream tells beside its events."""

    include_obfuscation: bool = False


class FunctionTool(Form):
    """A function that the model may call, with its description beside its type."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
