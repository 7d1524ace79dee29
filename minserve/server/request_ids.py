"""The header ``x-request-id``: taken from the client where it is usable, and on every response."""

from __future__ import annotations

import re
import uuid

from aiohttp import web

HEADER = "x-request-id"
_USABLE = re.compile(r"[\x20-\x7e]{1,128}")
_KEY = web.RequestKey("request_id", str)


def new_request_id() -> str:
    """Return an id that no other request has."""
    return uuid.uuid4().hex


def request_id(request: web.BaseRequest) -> str:
    """Return a request's id: the client's own, if it is printable ASCII of up to 128 characters."""
    if _KEY not in request:
        given = request.headers.get(HEADER, "")
        request[_KEY] = given if _USABLE.fullmatch(given) else new_request_id()
    return request[_KEY]


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Put the id on a response; a signal of aiohttp's that comes before the headers are sent."""
    response.headers[HEADER] = request_id(request)
