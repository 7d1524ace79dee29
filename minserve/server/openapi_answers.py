"""JSON schemas of the answers, for `/openapi.json`."""

from __future__ import annotations

from typing import Any

from minserve.request import FinishReason

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_NUMBER_OR_NULL = {"type": ["number", "null"]}


def ref(name: str) -> dict[str, Any]:
    """Return a reference to one of the schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def obj(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """Return the schema of an object; without ``required`` it has all the properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that may be missing."""
    return {"anyOf": [schema, {"type": "null"}]}


_TOKEN_IDS = array(_COUNT)
_ENDS = [one.value for one in FinishReason]
_CHOICE = {
    "index": _COUNT,
    "finish_reason": {"enum": _ENDS},
    "stop_reason": {"type": ["string", "integer", "null"]},
}
# By token id, as text.
_PROMPT_LOGPROB = {
    "type": "object",
    "additionalProperties": obj({"logprob": _NUMBER, "rank": _COUNT, "decoded_token": _TEXT}),
}
# What is told of a prompt on request: in each choice of a completion, once in a chat.
_OF_PROMPT = {
    "prompt_token_ids": _TOKEN_IDS,
    "prompt_logprobs": array(or_null(_PROMPT_LOGPROB)),
}
_LOGPROB = {"token": _TEXT, "logprob": _NUMBER, "bytes": or_null(array(_COUNT))}


def _answer(choice: str, kind: str, **more: dict[str, Any]) -> dict[str, Any]:
    always = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": _COUNT,
        "model": _TEXT,
        "choices": array(ref(choice)),
        "usage": ref("Usage"),
    }
    return obj({**always, **more}, required=list(always))


def _choice(properties: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    always = {**_CHOICE, **properties}
    return obj({**always, "token_ids": _TOKEN_IDS, **more}, required=list(always))


SCHEMAS: dict[str, Any] = {
    "Error": obj(
        {
            "error": obj(
                {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": _TEXT_OR_NULL,
                    "code": _TEXT_OR_NULL,
                }
            )
        }
    ),
    "Completion": _answer("CompletionChoice", "text_completion"),
    "CompletionChoice": _choice(
        {"text": _TEXT, "logprobs": or_null(ref("CompletionLogprobs"))}, **_OF_PROMPT
    ),
    "CompletionLogprobs": obj(
        {
            "tokens": array(_TEXT),
            "token_logprobs": array(_NUMBER_OR_NULL),
            "top_logprobs": array(or_null({"type": "object", "additionalProperties": _NUMBER})),
            "text_offset": array(_COUNT),
        }
    ),
    "ChatCompletion": _answer("ChatCompletionChoice", "chat.completion", **_OF_PROMPT),
    "ChatCompletionChoice": _choice(
        {
            "finish_reason": {"enum": [*_ENDS, "tool_calls"]},
            "message": obj(
                {
                    "role": _TEXT,
                    "content": _TEXT_OR_NULL,
                    "refusal": _TEXT_OR_NULL,
                    "reasoning_content": _TEXT,
                    "tool_calls": array(ref("CalledTool")),
                },
                required=["role", "content", "refusal"],
            ),
            "logprobs": or_null(obj({"content": array(ref("TokenLogprob"))})),
        }
    ),
    "CalledTool": obj(
        {
            "id": _TEXT,
            "type": {"const": "function"},
            "function": obj({"name": _TEXT, "arguments": _TEXT}),
        }
    ),
    "TokenLogprob": obj({**_LOGPROB, "top_logprobs": array(obj(_LOGPROB))}),
    "Usage": obj(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": obj({"cached_tokens": _COUNT}),
            "completion_tokens_details": obj({"reasoning_tokens": _COUNT}),
            "acceptance": obj(
                {"draft_tokens": _COUNT, "accepted_tokens": _COUNT, "rate": _NUMBER_OR_NULL}
            ),
            "slo": ref("KeptSLO"),
        },
        required=["prompt_tokens", "completion_tokens", "total_tokens"],
    ),
    "KeptSLO": obj(
        properties={
            "class": _TEXT_OR_NULL,
            "admitted": {"type": "boolean"},
            "attained": {"type": "boolean"},
            "ttft_ms": _NUMBER_OR_NULL,
            "mean_tpot_ms": _NUMBER_OR_NULL,
            "worst_token_lateness_ms": _NUMBER_OR_NULL,
            "finish_ms": _NUMBER_OR_NULL,
            "targets": {"type": "object", "additionalProperties": _NUMBER_OR_NULL},
            "task": obj(
                {
                    "id": _TEXT,
                    "call": _COUNT,
                    "calls": {"type": ["integer", "null"]},
                    "remaining_ms": _NUMBER_OR_NULL,
                    "given_up": {"type": "boolean"},
                }
            ),
        },
        required=["class", "admitted", "attained", "targets"],
    ),
    "Tokens": obj(
        {
            "tokens": _TOKEN_IDS,
            "count": _COUNT,
            "max_model_len": _COUNT,
            "token_strs": array(_TEXT),
        },
        required=["tokens", "count", "max_model_len"],
    ),
    "Text": obj({"prompt": _TEXT}),
    "Model": obj(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _TEXT,
            "root": _TEXT,
            "max_model_len": _COUNT,
            "default_sampling_params": {"type": "object"},
        }
    ),
    "ModelList": obj({"object": {"const": "list"}, "data": array(ref("Model"))}),
    "Health": obj(
        {
            "status": _TEXT,
            "unfinished": _COUNT,
            "replicas": {"type": "object", "additionalProperties": _COUNT},
        },
        required=["status", "unfinished"],
    ),
    "Replicas": obj({"replicas": array(ref("Replica"))}),
    "Replica": obj(
        {
            "replica": _COUNT,
            "state": _TEXT,
            "for_s": _NUMBER,
            "pid": {"type": ["integer", "null"]},
            "host": _TEXT_OR_NULL,
            "requests": _COUNT,
            "routed": _COUNT,
            "lost": _COUNT,
        }
    ),
}
