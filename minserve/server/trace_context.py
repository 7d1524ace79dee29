"""The trace that a request belongs to, from the headers of W3C's Trace Context.

https://www.w3.org/TR/trace-context/ says what is valid. What is not counts as not there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from aiohttp import web

# A later version may have more fields behind these; version 00 has none.
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
# Characters of both headers. Of the second one, at least 512 have to be passed on.
MAX_PARENT, MAX_STATE = 256, 1024


def trace_headers(request: web.Request) -> Mapping[str, str]:
    """Return ``traceparent``, and ``tracestate`` where there is one; nothing if they are not valid."""
    given = request.headers.getall("traceparent", [])
    if len(given) != 1 or _ids(given[0]) is None:
        return {}
    state = ",".join(request.headers.getall("tracestate", []))
    return {
        "traceparent": given[0],
        **({"tracestate": state} if 0 < len(state) <= MAX_STATE else {}),
    }


def trace_id_of(headers: Mapping[str, str]) -> str | None:
    """Return the trace's id of what `trace_headers` has returned."""
    ids = _ids(headers.get("traceparent", ""))
    return None if ids is None else ids[0]


def _ids(parent: str) -> tuple[str, str] | None:
    """Return the ids of the trace and of the caller's span; ``None`` where a header is not valid."""
    found = _PARENT.fullmatch(parent.strip(" \t")) if len(parent) <= MAX_PARENT else None
    if found is None:
        return None
    version, trace_id, span_id, more = found.groups()
    if (
        version == "ff"
        or (version == "00" and more)
        or not int(trace_id, 16)
        or not int(span_id, 16)
    ):
        return None
    return trace_id, span_id
