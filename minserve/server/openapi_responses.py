"""JSON schemas of the answers of /v1/responses, for `/openapi.json`."""

from __future__ import annotations

from typing import Any

from minserve.server.openapi_answers import array, obj, or_null, ref

_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_OBJECT = {"type": "object"}
_NULL = {"type": "null"}
_STATUS = {"enum": ["completed", "incomplete"]}
_TEXT_PART = {
    "type": {"const": "output_text"},
    "text": _TEXT,
    "annotations": array(_OBJECT),
    "logprobs": array(ref("TokenLogprob")),
}
# What a response tells of its request.
_TOLD = {
    "background": {"const": False},
    "instructions": _TEXT_OR_NULL,
    "max_output_tokens": or_null(_COUNT),
    "max_tool_calls": _NULL,
    "metadata": {"type": "object", "additionalProperties": _TEXT},
    "parallel_tool_calls": {"type": "boolean"},
    "previous_response_id": _NULL,
    "reasoning": _OBJECT,
    "service_tier": _TEXT,
    "store": {"const": False},
    "temperature": _NUMBER,
    "text": _OBJECT,
    "tool_choice": {"type": ["string", "object"]},
    "tools": array(_OBJECT),
    "top_logprobs": _COUNT,
    "top_p": _NUMBER,
    "truncation": {"const": "disabled"},
}


def _item(kind: str, properties: dict[str, Any]) -> dict[str, Any]:
    return obj({"id": _TEXT, "type": {"const": kind}, "status": _STATUS, **properties})


_USAGE = {
    "input_tokens": _COUNT,
    "input_tokens_details": obj({"cached_tokens": _COUNT, "cache_write_tokens": _COUNT}),
    "output_tokens": _COUNT,
    "output_tokens_details": obj({"reasoning_tokens": _COUNT}),
    "total_tokens": _COUNT,
}
RESPONSE_SCHEMAS: dict[str, Any] = {
    "Response": obj(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "completed_at": or_null(_COUNT),
            "model": _TEXT,
            "status": _STATUS,
            "error": _NULL,
            "incomplete_details": or_null(obj({"reason": {"const": "max_output_tokens"}})),
            "output": array(
                {"anyOf": [ref("ReasoningItem"), ref("MessageItem"), ref("FunctionCallItem")]}
            ),
            "usage": ref("ResponseUsage"),
            **_TOLD,
        }
    ),
    "ReasoningItem": _item(
        "reasoning",
        {
            "summary": array(_OBJECT),
            "content": array(obj({"type": {"const": "reasoning_text"}, "text": _TEXT})),
        },
    ),
    "MessageItem": _item(
        "message", {"role": {"const": "assistant"}, "content": array(obj(_TEXT_PART))}
    ),
    "FunctionCallItem": _item(
        "function_call", {"call_id": _TEXT, "name": _TEXT, "arguments": _TEXT}
    ),
    "ResponseUsage": obj({**_USAGE, "slo": ref("KeptSLO")}, required=list(_USAGE)),
}
