"""What a request was routed to: the one ground on which checks tell routes apart.

Paths can be written in many ways. What counts is the route that will run, so no check looks at the
text of a path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

FEED = "/page/feed"
# Browsers and monitoring systems ask these. Their answers tell nothing of prompts and outputs, so no
# key is needed.
OPEN_ROUTES = ("/", "/page/{file}", "/health", "/metrics")
GENERATIONS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
_ORDERS = "/replicas/"
# Nothing is stored, so each of them answers at once that there is nothing.
_STORED = "/v1/responses/"


def route_of(request: web.Request) -> str:
    """Return the path of the matched route, as it was added; empty where none matched."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical


def is_matched(request: web.Request) -> bool:
    """Return whether there is a route for the request's path and method."""
    return request.match_info.http_exception is None


def is_safe(request: web.Request) -> bool:
    """Return whether a request's method asks for no change and no computing."""
    return request.method in ("GET", "HEAD", "OPTIONS")


def is_feed(request: web.Request) -> bool:
    """Return whether a request opens the page's feed, of which there are only so many."""
    return route_of(request) == FEED


def is_open(request: web.Request) -> bool:
    """Return whether a request needs no API key."""
    if isinstance(request.match_info.http_exception, web.HTTPMethodNotAllowed):
        return request.path in OPEN_ROUTES  # no handler will run
    return route_of(request) in OPEN_ROUTES


def is_order(request: web.Request) -> bool:
    """Return whether a request is an order to a replica."""
    return route_of(request).startswith(_ORDERS)


def generates(request: web.Request) -> bool:
    """Return whether a request asks for outputs of the model."""
    return computes(request) and route_of(request) in GENERATIONS


def computes(request: web.Request) -> bool:
    """Return whether a request makes the server work on a body."""
    return is_matched(request) and not (
        is_safe(request) or is_order(request) or route_of(request).startswith(_STORED)
    )
