"""How names of hosts and origins, URLs and keys are written in settings."""

from __future__ import annotations

import re
from collections.abc import Collection

from minserve.errors import ConfigError

# How an origin is written in the header Origin; `null` is that of files and of sandboxed frames.
ORIGIN = re.compile(r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#]+/?")
URL = re.compile(r"https?://[^/\s?#]+(/[^\s?#]*)?")
HOST_NAME = re.compile(r"\*|[A-Za-z0-9._-]+")


def names_in(values: Collection[str]) -> list[str]:
    """Return the names of a setting that may be given several times, or with commas."""
    return [name for value in values for name in value.replace(",", " ").split()]


def check_key(key: str, what: str) -> None:
    """Check that a key can be sent in a header.

    Raises:
        ConfigError: if not; it does not hold the key.
    """
    if key == "":
        raise ConfigError(f"{what} is empty; the API key may be left out to serve without one")
    if not key.isprintable() or any(character.isspace() for character in key):
        raise ConfigError(f"{what} has spaces or characters in it that no header can hold")
