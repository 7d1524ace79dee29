"""`/openapi.json`: the description of all endpoints, in OpenAPI 3.1, made of the parameters' table."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from minserve.server.json_array import dump_json
from minserve.server.openapi_answers import SCHEMAS, obj, ref
from minserve.server.openapi_responses import RESPONSE_SCHEMAS
from minserve.server.page.feed import MAX_FRAMES
from minserve.server.page.frames import FRAME_SCHEMA
from minserve.server.page.front_page import FILES
from minserve.server.parameters.forms import AllowedTools, NamedTool, Tool
from minserve.server.parameters.parameter import GENERATION, PATHS, Endpoint, Parameter, Sort
from minserve.server.parameters.responses_forms import FunctionTool
from minserve.server.parameters.table import BY_ENDPOINT

_COMPONENTS = "#/components/schemas/{name}"
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")  # of Markdown
_NULL = {"type": "null"}
# Forms that the table's schemas name.
_NAMED_FORMS = (Tool, NamedTool, AllowedTools, FunctionTool)
_ERRORS = {
    "400": "a wrong or unsupported value, named by `param`",
    "401": "the API key is missing or wrong",
    "403": "not allowed from where the request comes",
    "404": "an unknown path, model, response or replica",
    "405": "the path does not take that method",
    "408": "the request did not come in time",
    "411": "the length of the body is not told",
    "413": "the body is too large",
    "415": "the body is compressed, or no JSON",
    "429": "the queue is full, or an SLO cannot be kept",
    "500": "generation failed",
    "503": "the server is starting, draining or dead",
    "504": "the request took longer than the server allows",
}
_BODIES: dict[Endpoint, str] = {
    "completions": "CompletionRequest",
    "chat": "ChatCompletionRequest",
    "responses": "ResponseRequest",
    "tokenize": "TokenizeRequest",
    "detokenize": "DetokenizeRequest",
}
_ANSWERS: dict[Endpoint, str] = {
    "completions": "Completion",
    "chat": "ChatCompletion",
    "responses": "Response",
    "tokenize": "Tokens",
    "detokenize": "Text",
}
_SUMMARIES: dict[Endpoint, str] = {
    "completions": "Continue a prompt",
    "chat": "Answer a chat",
    "responses": "Answer a conversation in the form of OpenAI's Responses API",
    "tokenize": "Turn a text or messages into token ids",
    "detokenize": "Turn token ids into text",
}
_SLO_HEADERS = (
    "x-slo-ttft-ms",
    "x-slo-tpot-ms",
    "x-slo-finish-ms",
    "x-llm-d-slo-ttft-ms",
    "x-llm-d-slo-tpot-ms",
)


@cache
def openapi_json() -> bytes:
    """Return the description as JSON."""
    return dump_json(openapi())


def openapi() -> dict[str, Any]:
    """Return the description of all endpoints."""
    forms: dict[str, Any] = {}
    bodies = {name: _body(endpoint, forms) for endpoint, name in _BODIES.items()}
    forms |= msgspec.json.schema_components(_NAMED_FORMS, ref_template=_COMPONENTS)[1]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "minserve",
            "version": version("minserve"),
            "description": "An LLM inference server that keeps latency promises.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"key": []}],
        "paths": {
            **{PATHS[one]: {"post": _post(one)} for one in PATHS},
            **_gets(),
            **_orders(),
            **_stored(),
        },
        "components": {
            "schemas": {
                **SCHEMAS,
                **RESPONSE_SCHEMAS,
                "PageFrame": FRAME_SCHEMA,
                **forms,
                **bodies,
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _body(endpoint: Endpoint, forms: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a body, and add the schemas that it refers to."""
    parameters = BY_ENDPOINT[endpoint].values()
    schema = obj(
        {one.name: _value(one, forms) for one in parameters if one.sort is not Sort.REFUSED},
        required=[one.name for one in parameters if one.required],
    )
    schema["additionalProperties"] = False
    if endpoint == "tokenize":
        schema["anyOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
    return schema


def _value(parameter: Parameter, forms: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter's values."""
    if parameter.sort is Sort.NEUTRAL:
        schema: dict[str, Any] = {"enum": [*parameter.neutral, None]}
        if parameter.same_as is not None:  # a schema cannot compare two fields
            schema = {"type": ["integer", "null"]}
        return _described(schema, f"Not implemented: {parameter.says}" if parameter.says else "")
    schema = dict(parameter.schema)
    if parameter.form is not Any:
        (own,), components = msgspec.json.schema_components(
            [parameter.form], ref_template=_COMPONENTS
        )
        forms |= components
        schema = {**own, **schema}
    accepted = [schema, *([{"enum": list(parameter.neutral)}] if parameter.neutral else [])]
    if not parameter.required:
        accepted.append(_NULL)
    schema = accepted[0] if len(accepted) == 1 else {"anyOf": accepted}
    hint = "A hint that changes no result: " if parameter.sort is Sort.HINT else ""
    return _described(schema, hint + parameter.says)


def _described(schema: dict[str, Any], text: str) -> dict[str, Any]:
    text = _LINK.sub(r"\1", text)
    return {**schema, "description": text} if text else schema


def _post(endpoint: Endpoint) -> dict[str, Any]:
    content = {"application/json": {"schema": ref(_ANSWERS[endpoint])}}
    operation: dict[str, Any] = {
        "operationId": endpoint,
        "summary": _SUMMARIES[endpoint],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref(_BODIES[endpoint])}},
        },
    }
    if endpoint in GENERATION:
        content["text/event-stream"] = {"schema": {"type": "string"}}
        milliseconds = {"type": "string", "pattern": r"^[0-9]{1,12}(\.[0-9]{1,12})?$"}
        operation["parameters"] = [
            {"name": name, "in": "header", "schema": milliseconds} for name in _SLO_HEADERS
        ]
    answer = {
        "description": "the answer; with `stream: true` a stream of events",
        "headers": {
            "x-minserve-ignored": {
                "description": "the names of hints that changed nothing, separated by commas",
                "schema": {"type": "string"},
            }
        },
        "content": content,
    }
    if endpoint in ("tokenize", "detokenize"):
        answer["description"] = "the answer"
    return {**operation, "responses": {"200": answer, **_errors()}}


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": ref("Error")}}
    return {status: {"description": cause, "content": content} for status, cause in _ERRORS.items()}


def _answer(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {"200": {"description": "the answer", "content": {kind: {"schema": schema}}}}


def _files() -> dict[str, Any]:
    content = {kind: {"schema": {"type": "string"}} for kind in sorted(set(FILES.values()))}
    return {"200": {"description": "the file", "content": content}}


def _gets() -> dict[str, Any]:
    """Return the paths that only tell something."""
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    text = {"type": "string"}
    file = {
        "name": "file",
        "in": "path",
        "required": True,
        "schema": {"enum": list(FILES)},
    }
    frames = {
        "name": "frames",
        "in": "query",
        "description": "the number of frames after which the feed ends; without it, it does not",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_FRAMES},
    }
    rows: dict[str, tuple[str, str, dict[str, Any], list[dict[str, Any]]]] = {
        "/": ("frontPage", "A page for people", _answer(text, "text/html"), []),
        "/page/feed": (
            "pageFeed",
            "What the page shows, as server-sent events: a frame of JSON in each",
            _answer(ref("PageFrame"), "text/event-stream"),
            [frames],
        ),
        "/page/{file}": ("pageFile", "A file that the page loads", _files(), [file]),
        "/v1/models": ("listModels", "The one model, in a list", _answer(ref("ModelList")), []),
        "/v1/models/{model}": ("getModel", "The one model", _answer(ref("Model")), [model]),
        "/health": ("health", "Whether requests are taken", _answer(ref("Health")), []),
        "/metrics": ("metrics", "Counts for Prometheus", _answer(text, "text/plain"), []),
        "/openapi.json": ("openapi", "This description", _answer({"type": "object"}), []),
        "/replicas": ("replicas", "How each replica stands", _answer(ref("Replicas")), []),
    }
    return {
        path: {
            "get": {
                "operationId": name,
                "summary": summary,
                "responses": {**answer, **_errors()},
                **({"parameters": parameters} if parameters else {}),
            }
        }
        for path, (name, summary, answer, parameters) in rows.items()
    }


def _orders() -> dict[str, Any]:
    """Return the paths with which an operator gives orders to a replica."""
    number = {
        "name": "number",
        "in": "path",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    }
    verbs = {
        "drain": "Send a replica nothing more, and wait until it has nothing left",
        "resume": "Send requests to a drained replica again",
        "restart": "Drain a replica, and start its process anew",
    }
    return {
        f"/replicas/{{number}}/{verb}": {
            "post": {
                "operationId": f"{verb}Replica",
                "summary": summary,
                "parameters": [number],
                "responses": {**_answer(ref("Replicas")), **_errors()},
            }
        }
        for verb, summary in verbs.items()
    }


def _stored() -> dict[str, Any]:
    """Return the paths of responses that would have to be stored: nothing is found there."""
    response = {"name": "response", "in": "path", "required": True, "schema": {"type": "string"}}
    rows = {
        ("/v1/responses/{response}", "get"): "retrieveResponse",
        ("/v1/responses/{response}", "delete"): "deleteResponse",
        ("/v1/responses/{response}/input_items", "get"): "listInputItems",
        ("/v1/responses/{response}/cancel", "post"): "cancelResponse",
    }
    paths: dict[str, Any] = {}
    for (path, verb), name in rows.items():
        paths.setdefault(path, {})[verb] = {
            "operationId": name,
            "summary": "Nothing: responses are not stored",
            "parameters": [response],
            "responses": _errors(),
        }
    return paths
