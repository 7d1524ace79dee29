"""What aiohttp's parser refuses before any handler runs, as HTTP errors in words of our own.

The parser's own messages repeat what was sent, so none of them is passed on: each known reason has
a status and a sentence here.
"""

from __future__ import annotations

from aiohttp.http_exceptions import BadHttpMethod, InvalidURLError, LineTooLong

from minserve.server.errors import HttpError

MAX_URI_BYTES = 8190
# One header, its name and its value. Not equal to the limit of the URI: by its limit alone does
# `LineTooLong` tell what was too long.
MAX_HEADER_BYTES = 8192
MAX_HEADERS = 128

_HTTP_VERSION = "this port speaks HTTP/1.0 and HTTP/1.1"
_NO_HTTP2 = f"{_HTTP_VERSION}, and HTTP/2 only through a proxy"
_BAD_LENGTH = "the Content-Length is not a whole number of bytes"
_TWO_LENGTHS = "there is a Content-Length and a Transfer-Encoding; send one of them"
_BAD_CHUNK = "the body's chunks are malformed"
_BAD_HEADER = "a header is malformed"
# The parser's reasons, of llhttp and of aiohttp, as they stand before the bytes that it quotes.
_REASONS = {
    "Pause on PRI/Upgrade": (505, _NO_HTTP2),
    "Invalid HTTP version": (505, _HTTP_VERSION),
    "Content-Length overflow": (413, "the request body is too large"),
    "Chunk size overflow": (413, "the request body is too large"),
    "Too many headers received": (431, f"there are more than {MAX_HEADERS} headers"),
    "Missing 'Host' header in request.": (400, "the Host header is missing"),
    "Duplicate 'Host' header found.": (400, "the Host header appears twice"),
    "Invalid character in Content-Length": (400, _BAD_LENGTH),
    "Empty Content-Length": (400, _BAD_LENGTH),
    "Duplicate Content-Length": (400, "the Content-Length appears twice"),
    "Transfer-Encoding can't be present with Content-Length": (400, _TWO_LENGTHS),
    "Content-Length can't be present with Transfer-Encoding": (400, _TWO_LENGTHS),
    "Content-Length can't be present with chunked encoding": (400, _TWO_LENGTHS),
    "Request has invalid `Transfer-Encoding`": (
        400,
        "the only Transfer-Encoding that is understood is chunked",
    ),
    "Invalid character in chunk size": (400, _BAD_CHUNK),
    "Invalid character in chunk extensions": (400, _BAD_CHUNK),
    "Invalid header token": (400, _BAD_HEADER),
    "Invalid header value char": (400, _BAD_HEADER),
    "Unexpected space after start line": (400, _BAD_HEADER),
    "Data after `Connection: close`": (
        400,
        "there are bytes behind a request that ends its connection",
    ),
}
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
    text = str(getattr(error, "message", "")).removeprefix("Bad status line:\n  ")
    status, message = _REASONS.get(text.partition(":\n\n")[0], (400, "this is not HTTP/1.1"))
    return HttpError(status, message)


def unsupported_version() -> HttpError:
    """Return the error for a request line without a version, or with one that is not spoken."""
    return HttpError(505, _HTTP_VERSION)
