"""The page at ``/``, for people who open the server in a browser, and the command to try it with.

The page needs no API key, since a browser cannot send one. So where a key is needed, it says
nothing that the key protects: not even the model's name, which may come from a path.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shlex
from functools import cache
from importlib import resources
from string import Template

from aiohttp import web

_STYLE = (
    "body{font:1rem/1.5 sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem;"
    "color-scheme:light dark}pre{padding:.8rem;border:1px solid;white-space:pre-wrap;"
    "overflow-wrap:anywhere}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    # Nothing is loaded or run: even if a name got through unescaped, it could do nothing.
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


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
    text = _template().substitute(
        style=_STYLE,
        state=html.escape(state),
        example=example,
        base_url=html.escape(f"{url}/v1"),
    )
    return web.Response(
        text=text, status=status, content_type="text/html", charset="utf-8", headers=HEADERS
    )


@cache
def _template() -> Template:
    file = resources.files("minserve.server") / "front_page.html"
    return Template(file.read_text(encoding="utf-8"))
