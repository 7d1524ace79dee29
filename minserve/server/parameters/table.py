"""The table of all parameters, and how a body is read by it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from minserve.errors import InvalidRequestError
from minserve.server.body import MAX_NAME, refusal
from minserve.server.parameters.hints import HINTS, NESTED
from minserve.server.parameters.parameter import PATHS, Endpoint, Parameter, Sort
from minserve.server.parameters.responses import (
    RESPONSES_HINTS,
    RESPONSES_NESTED,
    RESPONSES_REFUSED,
    RESPONSES_WORKS,
)
from minserve.server.parameters.unsupported import REFUSED
from minserve.server.parameters.works import WORKS

FIELDS: tuple[Parameter, ...] = (
    *WORKS,
    *HINTS,
    *REFUSED,
    *RESPONSES_WORKS,
    *RESPONSES_HINTS,
    *RESPONSES_REFUSED,
)
PARAMETERS: tuple[Parameter, ...] = (*FIELDS, *NESTED, *RESPONSES_NESTED)
BY_ENDPOINT: Mapping[Endpoint, Mapping[str, Parameter]] = {
    endpoint: {one.name: one for one in FIELDS if endpoint in one.endpoints} for endpoint in PATHS
}


def read_body(body: Mapping[str, Any], endpoint: Endpoint) -> tuple[dict[str, Any], list[str]]:
    """Sort the fields of a body.

    Args:
        body: a strict JSON object, as `parse_object` returns it.

    Returns:
        The values of what works, by name and in the forms of the table, and the names of the hints
        that asked for something.

    Raises:
        InvalidRequestError: naming the first field that is unknown, wrong, or asks for something
            that cannot be had.
    """
    known = BY_ENDPOINT[endpoint]
    given: dict[str, Any] = {}
    hints: list[str] = []
    for name, value in body.items():
        if value is None:
            continue
        parameter = known.get(name)
        if parameter is None:
            raise _unknown(name, endpoint)
        if parameter.is_neutral(value, body):
            continue
        if parameter.sort is Sort.WORKS:
            given[name] = parameter.read(value)
        elif parameter.sort is Sort.HINT:
            parameter.read(value)
            hints.append(name)
        else:
            raise parameter.refuse(value)
    for name, parameter in known.items():
        if parameter.required and body.get(name) is None:
            raise refusal(name, "is required")
    return given, hints


def _unknown(name: str, endpoint: Endpoint) -> InvalidRequestError:
    """Return the error for a name that the endpoint does not know, with the name that may be meant."""
    name = name[:MAX_NAME]
    others = [
        path
        for other, path in PATHS.items()
        if name in BY_ENDPOINT[other] and BY_ENDPOINT[other][name].sort is not Sort.REFUSED
    ]
    if others:
        return refusal(name, f"is a parameter of {' and '.join(others)} only")
    near = get_close_matches(name, BY_ENDPOINT[endpoint], n=1, cutoff=0.75)
    advice = f"; is {near[0]} meant?" if near else ""
    return refusal(name, f"is not supported by this server{advice}")
