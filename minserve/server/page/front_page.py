"""The page at ``/``, for people who open the server in a browser, and the command to try it with.

The page and its files need no API key, since a browser cannot send one. So where a key is needed,
they say nothing that the key protects: not even the model's name, which may come from a path. All
that is live on the page comes from the feed (`minserve.server.page.feed`), which needs the key.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Mapping
from functools import cache
from importlib import resources
from string import Template

from aiohttp import web

# What the page loads, by name, with the type of each.
FILES: Mapping[str, str] = {
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("main.js", "feed.js", "state.js", "charts.js", "lanes.js", "chat.js", "words.js"),
        "text/javascript",
    ),
}
_SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
HEADERS = {
    # Only files of this server are loaded, and only this server is asked: even if a name got through
    # unescaped, it could do nothing.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    **_SAFE,
}
# A browser asks each time whether its copy is still right, so that it is never that of an older server.
FILE_HEADERS = {"Cache-Control": "no-cache", **_SAFE}


def example_command(url: str, model: str | None, *, chat: bool, needs_key: bool) -> str:
    """Return a curl command that asks the server something.

    Args:
        url: the server's URL, without a path.
        model: the model's name; ``None`` leaves it out, as requests may.
        chat: whether the model has a chat template.
        needs_key: whether the server asks for an API key.
    """
    body: dict[str, object] = {} if model is None else {"model": model}
    if chat:
        body["messages"] = [{"role": "user", "content": "Name three colours."}]
    else:
        body["prompt"] = "The capital of France is"
    body["max_tokens"] = 64 if chat else 16
    body["temperature"] = 0
    target = shlex.quote(url + ("/v1/chat/completions" if chat else "/v1/completions"))
    key = ' -H "Authorization: Bearer KEY"' if needs_key else ""
    return (
        f"curl {target}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def front_page(url: str, state: str, command: str | None, *, status: int = 200) -> web.Response:
    """Return the page.

    Args:
        url: the server's URL, as the client wrote it: it is not trusted.
        state: a sentence in plain text that says what the server does.
        command: a command to try.
    """
    example = "" if command is None else f"<p>Try:</p>\n<pre>{html.escape(command)}</pre>"
    text = Template(_read("index.html")).substitute(
        state=html.escape(state),
        ready="no" if command is None else "yes",
        example=example,
        base_url=html.escape(f"{url}/v1"),
    )
    return web.Response(
        text=text, status=status, content_type="text/html", charset="utf-8", headers=HEADERS
    )


def page_file(name: str) -> web.Response:
    """Return a file that the page loads.

    Raises:
        HTTPNotFound: if it has no such file.
    """
    if name not in FILES:
        raise web.HTTPNotFound
    return web.Response(
        text=_read(name), content_type=FILES[name], charset="utf-8", headers=FILE_HEADERS
    )


@cache
def _read(name: str) -> str:
    file = resources.files("minserve.server.page") / "web" / name
    return file.read_text(encoding="utf-8")
