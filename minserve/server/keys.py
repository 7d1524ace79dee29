"""API keys: where they come from, and the check that every request passes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from minserve.access_names import check_key
from minserve.errors import ConfigError
from minserve.server.errors import HttpError
from minserve.server.routes import Handler, is_open
from minserve.server_config import ServerConfig

# The number of a request's key, counted from 0.
KEY_NUMBER = web.RequestKey("key_number", int)


class KeyRing:
    """The keys of a server, and the middleware that asks for one of them.

    Raises:
        ConfigError: if the file of keys cannot be used.
    """

    def __init__(self, config: ServerConfig) -> None:
        keys = list(config.api_key)
        if config.api_keys_file is not None:
            keys += read_keys(config.api_keys_file)
        self._digests = [_digest(key) for key in keys]

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let a request through that has a key or needs none, and note the key's number.

        Raises:
            HttpError: 401 without a right key.
        """
        if self._digests:
            number = self._number_of(request.headers.get("Authorization", ""))
            if number is not None:
                request[KEY_NUMBER] = number
            elif not is_open(request):
                raise HttpError(
                    401,
                    "missing or wrong API key; send 'Authorization: Bearer KEY'",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return await handler(request)

    def _number_of(self, header: str) -> int | None:
        """Return the number of the key that a header holds.

        It takes equally long whatever is given: digests have one length, `compare_digest` looks at
        all of it, and all keys are compared.
        """
        scheme, _, given = header.partition(" ")
        digest = _digest(given.strip(" "))
        found = None
        for number, expected in enumerate(self._digests):
            if hmac.compare_digest(digest, expected):
                found = number
        return found if scheme.lower() == "bearer" else None


def read_keys(file: str) -> Sequence[str]:
    """Return the keys of a file: one a line, without empty lines and those that begin with ``#``.

    Raises:
        ConfigError: if it cannot be read, holds no key, or a line is no key.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the API keys of {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the file of API keys {file} is not UTF-8") from None
    keys = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            check_key(line, f"line {number} of {file}")
            keys.append(line)
    if not keys:
        raise ConfigError(f"{file} holds no API key; write one a line")
    return keys


def _digest(key: str) -> bytes:
    # A header that is not UTF-8 has lone surrogates in it.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
