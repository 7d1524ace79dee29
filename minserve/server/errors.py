"""The one place that turns exceptions into HTTP statuses and OpenAI's error bodies."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from aiohttp import ClientConnectionResetError, web

from minserve.errors import (
    EngineStoppedError,
    GenerationError,
    InvalidRequestError,
    NoReplicaError,
    QueueFullError,
    ReplicaLostError,
    RequestTimeoutError,
    RequestTooLongError,
    SLOUnattainableError,
)
from minserve.server.json_array import dump_json

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "1"}
# Clients of OpenAI's API disregard a longer time than this, and some really sleep as long.
MAX_RETRY_AFTER_S = 60.0
MAX_MESSAGE_CHARS = 1000
MAX_PARAM_CHARS = 200


class HttpError(Exception):
    """A refusal for a reason of HTTP alone (keys, paths, sizes), not of the engine."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # A header that the message repeats may hold bytes that are not UTF-8.
        self.message = message.encode("utf-8", "replace").decode()[:MAX_MESSAGE_CHARS]
        self.kind = kind
        # An unknown field is named by its name, which the client has chosen.
        self.param = None if param is None else param[:MAX_PARAM_CHARS]
        self.code = code
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is made again, in another process, from its message alone.
        make = partial(
            HttpError, kind=self.kind, param=self.param, code=self.code, headers=self.headers
        )
        return make, (self.status, self.message)


def to_http_error(error: Exception) -> HttpError:
    """Return the HTTP status and error body that an exception stands for.

    An exception of an unknown type is a mistake in the server. It is logged with its traceback and
    becomes a 500 that tells the client nothing of the inside.
    """
    # A message may repeat a value from the request, so its length is bounded.
    text = str(error)[:MAX_MESSAGE_CHARS]
    match error:
        case HttpError():
            return error
        case RequestTooLongError():
            return HttpError(400, text, param=error.param, code="context_length_exceeded")
        case InvalidRequestError():
            return HttpError(400, text, param=error.param)
        case QueueFullError():
            return HttpError(
                429, text, kind="rate_limit_error", code="queue_full", headers=RETRY_AFTER
            )
        case SLOUnattainableError():
            return HttpError(
                429,
                text,
                kind="rate_limit_error",
                code="slo_unattainable",
                headers=_when_to_retry(error),
            )
        case RequestTimeoutError():
            return HttpError(
                504,
                text,
                kind="timeout_error",
                code="request_timeout",
                headers={"x-should-retry": "false"},  # it would take as long again
            )
        case EngineStoppedError() | NoReplicaError() | ReplicaLostError():
            return unavailable(text)
        case GenerationError():
            logger.error("generation failed: %s", text, exc_info=error)
            return HttpError(500, text, kind="server_error", code="generation_failed")
        case web.HTTPException():
            return _from_aiohttp(error)
        case ClientConnectionResetError():
            # Nobody is there to read it. Clients that leave are nothing to fill the log with.
            return HttpError(400, "the client has closed the connection")
    logger.error("unexpected error", exc_info=error)
    return HttpError(500, "internal server error", kind="server_error")


def _when_to_retry(error: SLOUnattainableError) -> dict[str, str]:
    """Return headers with the wait that the planner predicts, in seconds and in milliseconds.

    In seconds it is rounded up and at least 1, for clients that read this header alone. Where no
    wait helps, a header says that instead, which OpenAI's own clients obey.
    """
    if math.isinf(error.retry_after_s):
        return {"x-should-retry": "false", "x-request-dropped-reason": error.reason}
    wait_s = min(max(0.0, error.retry_after_s), MAX_RETRY_AFTER_S)
    return {
        "Retry-After": str(max(1, math.ceil(wait_s))),
        "retry-after-ms": str(max(1, math.ceil(wait_s * 1e3))),
        "x-request-dropped-reason": error.reason,
    }


def unavailable(message: str) -> HttpError:
    """Return a 503 error, for a server that is starting, draining or dead."""
    return HttpError(503, message, kind="service_unavailable_error", headers=RETRY_AFTER)


def error_body(error: HttpError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: HttpError) -> web.Response:
    """Return the complete HTTP answer for an error."""
    return web.Response(
        status=error.status,
        body=dump_json(error_body(error)),
        content_type="application/json",
        headers=error.headers,
    )


def _from_aiohttp(error: web.HTTPException) -> HttpError:
    message = {
        404: "no such path; see GET /v1/models and POST /v1/chat/completions",
        405: f"this path takes {error.headers.get('Allow', 'another method')} alone",
        413: "the request body is too large",
        417: "Expect may only be 100-continue",
    }.get(error.status, HTTPStatus(error.status).phrase)
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return HttpError(error.status, message, kind=kind, headers=headers)
