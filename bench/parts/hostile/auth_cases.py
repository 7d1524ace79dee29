"""A server with an API key: every wrong way to show it, and every path around it."""

from __future__ import annotations

import base64

from parts.hostile.case import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    MESSAGES,
    TOKENIZE,
    HostileCase,
    Target,
    refused,
)
from parts.hostile.wire import Headers

NAME = "keys"
# Distinct from every part of itself, with signs that URLs and headers treat in their own ways.
KEY = "s3cret-KEY_with.signs~and/length=="
PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/smollm2"),
    ("POST", COMPLETIONS),
    ("POST", CHAT),
    ("POST", TOKENIZE),
    ("POST", DETOKENIZE),
    ("GET", "/replicas"),
    ("POST", "/replicas/0/drain"),
    ("GET", "/nowhere"),
    ("DELETE", "/v1/models"),
    # Paths that begin or end like an open one.
    ("GET", "//metrics/../v1/models"),
    ("GET", "/health/../v1/models"),
    ("GET", "/metrics/%2e%2e/v1/models"),
    ("GET", "/health/..%2fv1/models"),
    ("GET", "/health%2f..%2fv1%2fmodels"),
    ("GET", "/v1/models?/health"),
    ("GET", "/v1/models#/health"),
    ("GET", "/v1/models;/health"),
    ("GET", "/v1//models"),
    ("GET", "//v1/models"),
    ("GET", "/v1/models/../models"),
    ("GET", "/%76%31/models"),
    ("GET", "http://127.0.0.1/v1/models"),
]


def _with_key(scheme: str, key: str = KEY) -> Headers:
    return [("Authorization", f"{scheme} {key}")]


def _wrong() -> dict[str, Headers]:
    """Return headers that do not show the key."""
    basic = base64.b64encode(f":{KEY}".encode()).decode()
    return {
        "no key": [("Authorization", "")],
        "a wrong key": _with_key("Bearer", "wrong"),
        "no scheme": [("Authorization", KEY)],
        "an empty key": [("Authorization", "Bearer")],
        "the key's beginning": _with_key("Bearer", KEY[:-1]),
        "the key and more": _with_key("Bearer", KEY + "x"),
        "the key in the other case": _with_key("Bearer", KEY.swapcase()),
        "Basic": [("Authorization", f"Basic {basic}")],
        "another scheme": _with_key("Token"),
        "bytes that are no text": [("Authorization", b"Bearer \xff\xfe\xfd")],
        "a key of 7 kB": _with_key("Bearer", "x" * 7000),
        "the key and another": _with_key("Bearer", f"{KEY}, Bearer wrong"),
        "in x-api-key, wrong": [("Authorization", ""), ("x-api-key", "wrong")],
        "as a cookie": [("Authorization", ""), ("Cookie", f"key={KEY}; Authorization={KEY}")],
        "a proxy's": [("Authorization", ""), ("Proxy-Authorization", f"Bearer {KEY}")],
    }


def _welcome(name: str, path: str, headers: Headers) -> HostileCase:
    """Return a case of a request that is let in."""

    async def attack(target: Target) -> str | None:
        answer = await target.ask("GET", path, None, headers)
        return None if answer.status == 200 else f"expected 200, came {answer}"

    return HostileCase(NAME, name, attack, needs="key")


async def _large_body(target: Target) -> str | None:
    """Send megabytes without a key: they are not read before they are refused."""
    body = b'{"prompt": "' + b"x" * (target.limits.max_body // 2) + b'"}'
    answer = await target.ask("POST", COMPLETIONS, body, [("Authorization", "")])
    return None if answer.status == 401 else f"expected 401, came {answer}"


async def _tells_nothing(target: Target) -> str | None:
    """Look for the key in what strangers may read."""
    for path in ("/health", "/metrics", "/v1/models"):
        answer = await target.ask("GET", path, None, [("Authorization", "Bearer wrong")])
        if KEY.encode() in answer.body:
            return f"{path} tells the key"
    return None


def cases() -> list[HostileCase]:
    """Return all cases of keys."""
    none: Headers = [("Authorization", "")]
    return [
        *(
            refused(NAME, name, "/v1/models", None, 401, method="GET", headers=headers, needs="key")
            for name, headers in _wrong().items()
        ),
        *(
            refused(NAME, f"no key for {method} {path}", path,
                    {"messages": MESSAGES} if method == "POST" else None, 401, method=method,
                    headers=none, needs="key")
            for method, path in PATHS
        ),
        refused(NAME, "the key in the query", f"/v1/models?key={KEY}&api_key={KEY}", None, 401,
                method="GET", headers=none, needs="key"),
        *(
            _welcome(f"the scheme as {scheme}", "/v1/models", _with_key(scheme))
            for scheme in ("Bearer", "bearer", "BEARER")
        ),
        _welcome("/health without a key", "/health", none),
        _welcome("/metrics without a key", "/metrics", none),
        HostileCase(NAME, "megabytes without a key", _large_body, needs="key"),
        HostileCase(NAME, "the key is told nowhere", _tells_nothing, needs="key"),
    ]  # fmt: skip
