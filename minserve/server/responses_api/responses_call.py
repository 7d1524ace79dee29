"""The body of a request to /v1/responses, parsed into what chats are asked with.

A response is a chat with one choice, whose messages, tools and answer are written in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from minserve.errors import InvalidRequestError
from minserve.sampling_params import SamplingParams
from minserve.server.body import convert, refusal
from minserve.server.errors import HttpError
from minserve.server.messages import plain_messages
from minserve.server.parameters.forms import Messages
from minserve.server.parameters.responses import LOGPROBS
from minserve.server.parameters.responses_forms import (
    ReasoningOptions,
    ResponsesStreamOptions,
    TextFormat,
    TextOptions,
)
from minserve.server.parameters.table import read_body
from minserve.server.protocol import GenerationCall, generation_call, sampling_settings
from minserve.server.responses_api.functions import read_function_use
from minserve.server.responses_api.input_items import chat_messages
from minserve.server.responses_api.kinds import refuse_kinds
from minserve.server.structure_fields import read_structure
from minserve.server.thinking import ThinkingWish
from minserve.structure import Structure

# What a response calls the fields of the chat that it stands for.
_OWN_NAMES = {"messages": "input", "max_tokens": "max_output_tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesCall(GenerationCall):
    """A checked body of /v1/responses.

    Attributes:
        told: the fields of the response that repeat what was asked.
    """

    told: Mapping[str, Any] = field(default_factory=dict)


def parse_responses(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> ResponsesCall:
    """Check a /v1/responses body.

    Args:
        defaults: the model's own sampling settings, for those that the body leaves out.

    Raises:
        InvalidRequestError: if a field is wrong; the error names it.
    """
    refuse_kinds(values)
    given, hints = read_body(values, "responses")
    logprobs = _logprobs(given, hints)
    params = SamplingParams(
        **sampling_settings(given, defaults),
        structure=_structure(values, given),
        max_tokens=given.get("max_output_tokens"),
        logprobs=logprobs,
    )
    chat, their_hints = chat_messages(given["input"], given.get("instructions"))
    messages, _ = plain_messages(convert(chat, Messages, "input"))
    hints += [*their_hints, *_option_hints(given)]
    given.pop("stream_options", None)  # it has no option of a chat's
    return generation_call(
        given,
        hints,
        [messages],
        params,
        kind=ResponsesCall,
        chat=True,
        tool_use=read_function_use(values),
        thinking=_thinking(given),
        told=_told(values, given, params),
    )


def name_own_field(error: InvalidRequestError | HttpError) -> None:
    """Let an error about the chat that a response stands for name the response's field.

    Those of the body's own fields, which `parse_responses` raises, do so already.
    """
    error.param = _OWN_NAMES.get(error.param or "", error.param)


def _structure(values: Mapping[str, Any], given: Mapping[str, Any]) -> Structure | None:
    """Return the structure of the answer's text."""
    asked, form = read_structure(given), _text_format(values, given)
    if asked is not None and form is not None:
        raise refusal(asked.param, f"is a second structure of the output beside {form.param}")
    return asked or form


def _text_format(values: Mapping[str, Any], given: Mapping[str, Any]) -> Structure | None:
    text: TextOptions = given.get("text") or TextOptions()
    form = text.format or TextFormat()
    param = "text.format"
    if form.type != "json_schema":
        if form.schema is not None:
            raise refusal(f"{param}.type", 'must be "json_schema" where a schema is given')
        return Structure.of_json(param=param) if form.type == "json_object" else None
    if form.schema is None:
        raise refusal(f"{param}.schema", "is required")
    # As it was sent: in a schema, null is a value like others.
    return Structure.of_schema(values["text"]["format"]["schema"], param=param)


def _thinking(given: Mapping[str, Any]) -> ThinkingWish:
    reasoning = given.get("reasoning") or ReasoningOptions()
    return ThinkingWish(
        effort=reasoning.effort,
        enable=given.get("enable_thinking"),
        effort_name="reasoning.effort",
    )


def _logprobs(given: Mapping[str, Any], hints: list[str]) -> int | None:
    """Return how many alternatives are wanted of each token; ``None`` for no log probabilities."""
    included = given.get("include", [])
    hints += [f"include.{one}" for one in dict.fromkeys(included) if one != LOGPROBS]
    if LOGPROBS in included:
        return given.get("top_logprobs", 0)
    if given.get("top_logprobs"):
        raise refusal("top_logprobs", f'needs include: ["{LOGPROBS}"]')
    return None


def _option_hints(given: Mapping[str, Any]) -> list[str]:
    text = given.get("text") or TextOptions()
    reasoning = given.get("reasoning") or ReasoningOptions()
    stream = given.get("stream_options") or ResponsesStreamOptions()
    asked = {
        "text.verbosity": text.verbosity,
        "reasoning.summary": reasoning.summary or reasoning.generate_summary,
        "reasoning.context": reasoning.context,
        "reasoning.mode": reasoning.mode,
        "stream_options.include_obfuscation": stream.include_obfuscation or None,
    }
    return [name for name, value in asked.items() if value is not None]


def _told(
    values: Mapping[str, Any], given: Mapping[str, Any], params: SamplingParams
) -> dict[str, Any]:
    """Return what a response tells of its request.

    What may be long is JSON already, for it is sent several times.
    """
    tools = [
        {"description": None, "parameters": None, "strict": None, **one}
        for one in values.get("tools", [])
    ]
    return {
        "background": False,
        "instructions": _json(given.get("instructions")),
        "max_output_tokens": params.max_tokens,
        "max_tool_calls": None,
        "metadata": given.get("metadata", {}),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **values.get("reasoning", {})},
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": _json({"format": {"type": "text"}, **values.get("text", {})}),
        "tool_choice": _json(given.get("tool_choice", "auto")),
        "tools": _json(tools),
        "top_logprobs": params.logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
    }


def _json(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
