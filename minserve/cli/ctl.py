"""``minserve ctl``: shows the replicas of a running server, and drains or restarts them."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from minserve.errors import ConfigError, EngineStoppedError, InvalidRequestError

DEFAULT_URL = "http://127.0.0.1:8000"
VERBS = ("status", "drain", "resume", "restart")
COLUMNS = ("replica", "state", "for_s", "pid", "host", "requests", "routed", "lost")
# Draining waits until outputs end, which may take long.
TIMEOUT_S = 3600.0

_EXAMPLES = """\
examples:
  minserve ctl status
  minserve ctl drain 1          returns when replica 1 has nothing left to do
  minserve ctl restart 1        drains it, and returns when its new process is up
  minserve ctl resume 1         a drained one gets requests again
"""


def add_ctl(commands: argparse._SubParsersAction) -> None:
    """Add the command ``ctl``."""
    parser = commands.add_parser(
        "ctl",
        help="status of a server's replicas; drain or restart one",
        description="Look at the replicas of a running server, and drain or restart them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("replica", nargs="?", type=int, help="its number; not for status")
    parser.add_argument(
        "--url", default=DEFAULT_URL, help=f"URL of the server (default: {DEFAULT_URL})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=lambda args: _ctl(parser, args))


def _ctl(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if (args.replica is None) != (args.verb == "status"):
        parser.error("status takes no replica number, the other verbs need one")
    path = "/replicas" if args.verb == "status" else f"/replicas/{args.replica}/{args.verb}"
    answer = _ask(args.url.rstrip("/") + path, post=args.verb != "status")
    print(json.dumps(answer) if args.json else _table(answer["replicas"]))
    return 0


def _ask(url: str, *, post: bool) -> dict[str, Any]:
    """Send a GET or POST request to the server and return its JSON answer.

    Raises:
        EngineStoppedError: if no minserve answers.
        InvalidRequestError: if the server refuses; it holds the server's reason.
        ConfigError: for a key that cannot be sent.
    """
    key = os.environ.get("MINSERVE_API_KEY", "")
    if not key.isprintable():
        raise ConfigError("MINSERVE_API_KEY has characters that no HTTP header can have")
    try:
        request = urllib.request.Request(url, data=b"" if post else None)
        if key:
            # Headers are sent as Latin-1; so the key's bytes are those of UTF-8.
            request.add_header("Authorization", f"Bearer {key}".encode().decode("latin-1"))
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            told = json.loads(answer.read())
        if not all(row.keys() >= set(COLUMNS) for row in told["replicas"]):
            raise KeyError("replicas")
        return told
    except urllib.error.HTTPError as error:
        raise InvalidRequestError(_reason(error)) from None
    except (OSError, ValueError, HTTPException) as error:
        why = " ".join(str(error).split())
        raise EngineStoppedError(f"no minserve answers on {url}: {why}") from None
    except (KeyError, TypeError, AttributeError):
        raise EngineStoppedError(f"{url} answers, but not as minserve does") from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"


def _table(replicas: list[dict[str, Any]]) -> str:
    from minserve.tables import text_table

    rows = [[one[column] for column in COLUMNS] for one in replicas]
    return text_table(COLUMNS, rows, left=len(COLUMNS))
