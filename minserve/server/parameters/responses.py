"""The parameters that only /v1/responses has, or that have a meaning of their own there."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from msgspec import Meta

from minserve.sampling_params import MAX_LOGPROBS
from minserve.server.parameters.forms import Int64, Positive
from minserve.server.parameters.parameter import RESPONSES, Parameter, Sort
from minserve.server.parameters.responses_forms import (
    Includable,
    Input,
    Metadata,
    ReasoningOptions,
    ResponsesStreamOptions,
    TextOptions,
)

_Object = Annotated[dict[str, Any], Meta(max_length=256)]


def _row(name: str, sort: Sort, known_from: str, says: str, **more: Any) -> Parameter:
    return Parameter(
        name=name, sort=sort, endpoints=RESPONSES, known_from=known_from, says=says, **more
    )


def _works(name: str, says: str, **more: Any) -> Parameter:
    return _row(name, Sort.WORKS, more.pop("known_from", "OV"), says, **more)


def _hint(name: str, says: str, form: Any, **more: Any) -> Parameter:
    return _row(name, Sort.HINT, more.pop("known_from", "OV"), says, form=form, **more)


def _neutral(name: str, known_from: str, neutral: tuple[Any, ...], says: str) -> Parameter:
    return _row(name, Sort.NEUTRAL, known_from, says, neutral=neutral)


def _refused(name: str, known_from: str, says: str) -> Parameter:
    return _row(name, Sort.REFUSED, known_from, says)


# What an answer can tell in addition.
LOGPROBS, _ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
_BUILT_IN = "it belongs to built-in tools and images, and there are none"
_SEND_ALL = "nothing is stored here; send the whole conversation as `input`"
_IN_TURN = "answers are given while the client waits; leave it out, or use `stream`"

RESPONSES_WORKS = (
    _works(
        "input",
        "a text, or [the items of a conversation](responses.md)",
        form=Input,
        by_place=True,
        required=True,
        default="required",
    ),
    _works(
        "instructions",
        "a system message at the beginning",
        form=str,
        neutral=("",),
        default="none",
    ),
    _works(
        "max_output_tokens",
        "at least 1; counts the thinking too",
        form=Positive,
        default="what the model proposes, or what fits",
    ),
    _works(
        "include",
        f"`{LOGPROBS}`; what else OpenAI knows is a hint",
        form=list[Includable],
        neutral=([],),
        default="none",
    ),
    _works(
        "top_logprobs",
        f'0 to {MAX_LOGPROBS} alternatives for each token; needs `include: ["{LOGPROBS}"]`',
        form=Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)],
        default="0",
    ),
    _works(
        "text",
        "`format`: the form of the answer's text, as `response_format` of a chat",
        form=TextOptions,
        by_place=True,
        neutral=({},),
        default="free text",
    ),
    _works(
        "reasoning",
        "`effort`, as `reasoning_effort` of a chat",
        form=ReasoningOptions,
        by_place=True,
        neutral=({},),
        default="the model's own",
    ),
    _works(
        "tools",
        "[functions that the model may call](agents.md#tools), in the flat form of this endpoint",
        schema={"type": "array", "items": {"$ref": "#/components/schemas/FunctionTool"}},
        neutral=([],),
        default="none",
    ),
    _works(
        "tool_choice",
        "`auto`, `none`, `required`, or an object that names a function or `allowed_tools`",
        schema={"type": ["string", "object"]},
        neutral=("auto",),
        default="`auto`",
    ),
    _works(
        "metadata",
        "up to 16 labels of text, which come back with the answer",
        form=Metadata,
        default="none",
    ),
    _works(
        "stream_options",
        "`include_obfuscation`, which is a hint",
        form=ResponsesStreamOptions,
        by_place=True,
        known_from="O",
        default="none",
    ),
)

RESPONSES_HINTS = (
    _hint(
        "truncation",
        "a conversation that is too long is refused; leave out its oldest items",
        str,
        neutral=("disabled",),
    ),
    _hint("max_tool_calls", "it counts calls of built-in tools, and there are none", Int64),
    _hint("image", "there are no images", _Object, known_from="O", neutral=({},)),
)

RESPONSES_REFUSED = (
    _refused("previous_response_id", "OV", _SEND_ALL),
    _refused("conversation", "O", _SEND_ALL),
    _neutral("background", "OV", (False,), _IN_TURN),
    _neutral("background_options", "O", ({},), _IN_TURN),
    _refused("prompt", "OV", "prompt templates are OpenAI's own; write the text into `input`"),
    _refused("max_tokens", "OVSL", "use `max_output_tokens`"),
    _refused("max_completion_tokens", "OVSL", "use `max_output_tokens`"),
    _refused("messages", "OVSL", "use `input`"),
    _refused("response_format", "OVSL", "use `text.format`"),
    _refused("reasoning_effort", "OVSL", "use `reasoning.effort`"),
    _neutral("n", "OVSL", (1,), "a response is one output; send the request again"),
    _neutral("context_management", "O", ([],), "leave out the oldest items of `input` yourself"),
    _refused("moderation", "O", "this server moderates nothing"),
    _neutral("access_programs", "O", ({},), "they are OpenAI's own"),
    _refused("previous_response", "V", _SEND_ALL),
    _neutral("previous_input_messages", "V", ([],), _SEND_ALL),
    _neutral("enable_response_messages", "V", (False,), "see /tokenize"),
)

# Within other parameters, whose parser finds them. The header names them like this.
RESPONSES_NESTED = (
    *(
        _hint(
            f"include.{one}",
            "thinking comes as plain text" if one == _ENCRYPTED else _BUILT_IN,
            list,
        )
        for one in get_args(Includable)
        if one != LOGPROBS
    ),
    _hint("text.verbosity", "the length is the model's own", str),
    _hint("reasoning.summary", "the thinking itself is told", str),
    _hint("reasoning.context", "all reasoning in `input` goes to the template", str),
    _hint("reasoning.mode", "the model has one", str),
    _hint("input.phase", "a label for the client's own records", str),
    _hint("input.encrypted_content", "only who wrote it can read it", str),
    _hint("input.summary", "the reasoning itself counts, where both are given", list),
    _hint("input.content.annotations", "they are about an earlier answer", list),
    _hint("input.content.logprobs", "they are about an earlier answer", list),
    _hint("input.content.prompt_cache_breakpoint", "prefixes are always cached", _Object),
)
