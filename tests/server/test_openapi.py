"""`/openapi.json`: a valid description of what the server does, and the server does what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from live_server import RunningServer, post
from openapi_spec_validator import validate
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_parameters import ENOUGH, each_endpoint

from minserve.server.app import Server
from minserve.server.openapi import openapi
from minserve.server.parameters.parameter import PATHS, Endpoint, Sort
from minserve.server.parameters.table import BY_ENDPOINT
from minserve.server_config import ServerConfig

DESCRIPTION = json.loads(json.dumps(openapi()))
OPERATIONS = [(path, verb) for path, verbs in DESCRIPTION["paths"].items() for verb in verbs]
# The page's feed does not end by itself; tests/server/page/test_feed.py checks its frames.
POSITIVE = [
    (*operation, GenerationMode.POSITIVE)
    for operation in OPERATIONS
    if operation[0] != "/page/feed"
]
# Where nothing can be sent, or every text is a name, nothing wrong can be made either.
NEGATIVE = [
    (*operation, GenerationMode.NEGATIVE)
    for operation in OPERATIONS
    if operation[1] == "post" and operation != ("/v1/responses/{response}/cancel", "post")
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def body_validator(endpoint: Endpoint) -> Draft202012Validator:
    operation = DESCRIPTION["paths"][PATHS[endpoint]]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    return Draft202012Validator({**schema, "components": DESCRIPTION["components"]})


def test_the_description_is_valid() -> None:
    validate(DESCRIPTION)


def test_every_route_is_described() -> None:
    described = {(verb.upper(), path) for path, verb in OPERATIONS}
    routes = set()
    for route in Server(ServerConfig()).create_app().router.routes():
        assert route.resource is not None
        path = route.resource.canonical
        for one in [path.replace("{verb}", verb) for verb in ("drain", "resume", "restart")]:
            routes.add((route.method, one))
    assert {one for one in routes if one[0] not in ("HEAD", "OPTIONS")} == described


@each_endpoint
def test_bodies_are_described_as_the_parser_reads_them(endpoint: Endpoint) -> None:
    validator = body_validator(endpoint)
    body = ENOUGH[endpoint]
    assert validator.is_valid(body)
    assert not validator.is_valid({**body, "no_such_parameter": 1})
    for name, parameter in BY_ENDPOINT[endpoint].items():
        for value in parameter.neutral:
            assert validator.is_valid({**body, name: value}), (name, value)
        if parameter.sort in (Sort.NEUTRAL, Sort.REFUSED):
            assert not validator.is_valid({**body, name: {"something": ["else"]}}), name


@pytest.mark.parametrize(("path", "verb", "mode"), POSITIVE + NEGATIVE, ids=str)
def test_answers_are_those_that_are_described(
    server: RunningServer, path: str, verb: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(DESCRIPTION)
    operation = schema[path][verb]

    @settings(
        max_examples=4,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers_as_described(case: Case) -> None:
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    answers_as_described()
    server.wait_until_free()


def test_hints_are_named_by_every_kind_of_answer(server: RunningServer) -> None:
    hints: dict[str, Any] = {"metadata": {"a": "b"}, "service_tier": "flex", "store": False}
    for path, body in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": True}),
        ("/v1/chat/completions", {"messages": ENOUGH["chat"]["messages"], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a" * 9000, "max_tokens": 1}),  # read by another process
    ):
        status, headers, _ = post(server, path, {**body, **hints})
        told = {name.lower(): value for name, value in headers.items()}
        assert status == (400 if len(str(body)) > 9000 else 200)
        if status == 200:
            assert told["x-minserve-ignored"] == "metadata, service_tier"
            status, headers, _ = post(server, path, body)
            assert "x-minserve-ignored" not in {name.lower() for name in headers}
    status, headers, _ = post(
        server, "/tokenize", {"messages": [{"role": "user", "content": "a", "cache_control": {}}]}
    )
    assert headers["x-minserve-ignored"] == "messages.cache_control"


def test_the_description_is_served(server: RunningServer) -> None:
    status, headers, raw = post(server, "/openapi.json", None, method="GET")
    assert status == 200
    assert headers["Content-Type"].startswith("application/json")
    assert json.loads(raw) == DESCRIPTION
