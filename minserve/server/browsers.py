"""What keeps web pages from giving orders, and lets those through that the operator allows.

Whatever listens on this machine is within reach of every page in this machine's browser. A page of
another origin is known by the headers ``Sec-Fetch-Site`` and ``Origin``, which it cannot choose. A
page whose own name was made to point here (DNS rebinding) is known by its ``Host``. And since pages
may send bodies of a few types without asking first, bodies must be of a type that they may not.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from aiohttp import web

from minserve.access_names import names_in
from minserve.server.errors import HttpError
from minserve.server.routes import Handler, is_feed, is_matched, is_order, is_safe
from minserve.server_config import ServerConfig

ANY = "*"
EXPOSED_HEADERS = ", ".join(
    (
        "x-request-id",
        "Retry-After",
        "retry-after-ms",
        "x-should-retry",
        "x-request-dropped-reason",
        "x-minserve-ignored",
    )
)
PREFLIGHT_AGE_S = 600
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{0,5})?")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2000}")


class BrowserRules:
    """The checks on ``Host``, origins and types of bodies, and the headers of CORS.

    Without an API key, orders to replicas are taken from no page of another origin, allowed or not:
    with ``*`` every page in the world could give them.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._hosts = {name.lower().rstrip(".") for name in names_in(config.allowed_hosts)}
        self._own_hosts = _own_names(config.host)
        self._origins = {name.lower().rstrip("/") for name in names_in(config.allowed_origins)}
        self._has_keys = config.has_keys

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what a page of another site sent; answer a preflight of a page that may ask.

        Raises:
            HttpError: 403 for a host or an origin that is not allowed, 415 for the type of a body.
        """
        self._check_host(request)
        if _is_preflight(request):
            return self._answer_preflight(request)
        if is_feed(request) or not is_safe(request):
            # A page that cannot read a feed could still take its place from those who may.
            self._check_origin(request)
        if not is_safe(request) and request.body_exists and is_matched(request):
            _check_body_type(request)
        return await handler(request)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let pages of allowed origins read a response; a signal that comes before its headers."""
        if not self._origins:
            return
        if ANY not in self._origins:
            response.headers.add("Vary", "Origin")
        if allowed := self._allowed_origin(request):
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS

    def _check_host(self, request: web.Request) -> None:
        hosts = request.headers.getall("Host", [])  # HTTP/1.0 may do without
        if not request.raw_path.startswith("/"):  # a whole URI, whose host counts
            hosts.append(urlsplit(request.raw_path).netloc)
        for host in filter(None, hosts):
            if not self._knows(host):
                raise HttpError(
                    403,
                    "this server does not know itself by the Host that the request names; start it "
                    "with --allowed-hosts NAME to serve it",
                    code="unknown_host",
                )

    def _knows(self, host: str) -> bool:
        parts = _HOST.fullmatch(host)
        if parts is None:
            raise HttpError(400, "the Host header is malformed")
        if ANY in self._hosts:
            return True
        name = (parts[1] or parts[2]).lower().rstrip(".")
        if name in self._hosts or name in self._own_hosts or name.endswith(".localhost"):
            return True
        # No name service has a say in what an address points to.
        return _is_address(name)

    def _check_origin(self, request: web.Request) -> None:
        if _is_own_page(request):
            return
        if self._allowed_origin(request) and (self._has_keys or not is_order(request)):
            return
        raise HttpError(
            403,
            "a web page of another origin sent this; start the server with --allowed-origins "
            "ORIGIN if it may ask"
            + ("" if self._has_keys else ", and with --api-key if it may control replicas"),
            code="origin_not_allowed",
        )

    def _allowed_origin(self, request: web.Request) -> str | None:
        """Return what to allow the page that asks; ``None`` for nothing."""
        origin = request.headers.get("Origin")
        if origin is None:
            return None
        if ANY in self._origins:
            return ANY
        return origin if origin.lower() in self._origins else None

    def _answer_preflight(self, request: web.Request) -> web.Response:
        """Answer whether a page may send what it is about to send.

        Raises:
            HttpError: 403 if it may not.
        """
        self._check_origin(request)
        headers = {"Access-Control-Max-Age": str(PREFLIGHT_AGE_S)}
        refused = request.match_info.http_exception
        if isinstance(refused, web.HTTPMethodNotAllowed):
            headers["Access-Control-Allow-Methods"] = ", ".join(sorted(refused.allowed_methods))
        asked = request.headers.get("Access-Control-Request-Headers", "")
        if _HEADER_NAMES.fullmatch(asked):
            headers["Access-Control-Allow-Headers"] = asked
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)


def _is_preflight(request: web.Request) -> bool:
    return (
        request.method == "OPTIONS"
        and "Origin" in request.headers
        and "Access-Control-Request-Method" in request.headers
    )


def _is_own_page(request: web.Request) -> bool:
    """Return whether no browser says that a page of another origin sent a request."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    # Browsers leave it out where the server is neither this machine nor behind TLS.
    origin = request.headers.get("Origin")
    return origin is None or _authority(origin) == request.headers.get("Host", "").lower()


def _authority(origin: str) -> str | None:
    try:
        return urlsplit(origin.lower()).netloc or None
    except ValueError:
        return None


def _check_body_type(request: web.Request) -> None:
    if request.content_type != "application/json" or "Content-Type" not in request.headers:
        raise HttpError(
            415,
            "the body must be JSON; send the header 'Content-Type: application/json' "
            "(with curl: -H 'Content-Type: application/json')",
        )


def _own_names(bound: str) -> set[str]:
    """Return the names of this machine that need no allowing."""
    hostname = socket.gethostname().lower()
    return {"localhost", bound.lower(), hostname, hostname.partition(".")[0], f"{hostname}.local"}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
