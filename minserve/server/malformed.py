"""What aiohttp's parser refuses before any handler runs, as HTTP errors in words of our own.

The parser's own messages repeat what was sent, so none of them is passed on: each known reason has
a status and a sentence here.
"""

from __future__ import annotations

import re

from aiohttp.http_exceptions import BadHttpMethod, InvalidURLError, LineTooLong

from minserve.server.errors import HttpError

MAX_URI_BYTES = 8190
# One header, its name and its value. Not equal to the limit of the URI: by its limit alone does
# `LineTooLong` tell what was too long.
MAX_HEADER_BYTES = 8192
MAX_HEADERS = 128

_HTTP_VERSION = "this port speaks HTTP/1.0 and HTTP/1.1"
# Words of the parser's reasons, of llhttp and of aiohttp; the first that fit count.
_REASONS = (
    ("PRI/Upgrade|HTTP/2", 505, f"{_HTTP_VERSION}, and HTTP/2 only through a proxy"),
    ("Invalid (HTTP|major|minor) version", 505, _HTTP_VERSION),
    ("overflow", 413, "the request body is too large"),
    ("Too many headers", 431, f"there are more than {MAX_HEADERS} headers"),
    ("Missing 'Host'", 400, "the Host header is missing"),
    ("Duplicate", 400, "a header that may come once, such as Host or Content-Length, comes twice"),
    (
        "can't be present",
        400,
        "there is a Content-Length and a Transfer-Encoding; send one of them",
    ),
    ("Content-Length", 400, "the Content-Length is not a whole number of bytes"),
    ("Transfer-Encoding", 400, "the only Transfer-Encoding that is understood is chunked"),
    ("chunk", 400, "the body's chunks are malformed"),
    ("header|after start line", 400, "a header is malformed"),
    ("Connection: close", 400, "there are bytes behind a request that ends its connection"),
)
_TLS = "this port speaks plain HTTP; use http://, or a proxy with TLS before the server"


def refusal_of(error: BaseException) -> HttpError:
    """Return the answer for an exception of the parser. It holds nothing that the client sent."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, LineTooLong):
        if error.args[1] == MAX_URI_BYTES:
            return HttpError(414, f"the URI is longer than {MAX_URI_BYTES} bytes")
        return HttpError(431, f"a header is longer than {MAX_HEADER_BYTES} bytes")
    if isinstance(error, BadHttpMethod):
        is_tls = "HTTPS traffic" in error.args[0] or "HTTPS traffic" in error.message
        return HttpError(400, _TLS if is_tls else "this is not HTTP, or no method that is known")
    if isinstance(error, InvalidURLError | UnicodeError | ValueError):
        return HttpError(400, "the URI is malformed")
    # The reason stands before the bytes that it quotes.
    text = str(getattr(error, "message", "")).removeprefix("Bad status line:\n  ")
    reason = text.partition(":\n\n")[0]
    for words, status, message in _REASONS:
        if re.search(words, reason):
            return HttpError(status, message)
    return HttpError(400, "this is not HTTP/1.1")


def unsupported_version() -> HttpError:
    """Return the error for a request line without a version, or with one that is not spoken."""
    return HttpError(505, _HTTP_VERSION)
