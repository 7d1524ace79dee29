"""HTTP over a bare socket: what is sent may be anything, and what comes back is read with care.

Clients' libraries refuse to send most of what a hostile client sends, so none is used here.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

# Seconds for an answer. On a busy machine the answer to a large body takes its time.
ANSWER_S = 60.0
ERROR_FIELDS = {"message", "type", "param", "code"}

Headers = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def host_header(self) -> str:
        return f"{self.host}:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection.

        Raises:
            OSError: where the server does not take it in time.
        """
        async with asyncio.timeout(ANSWER_S):
            return await asyncio.open_connection(self.host, self.port)


@dataclass(frozen=True, slots=True)
class WireAnswer:
    """What came back.

    Attributes:
        status: the status; 0 where the server closed the connection without an answer, -1 where
            nothing came in time, -2 where the bytes are no HTTP/1 answer.
        headers: by names in lower case.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def __str__(self) -> str:
        name = {0: "closed", -1: "no answer in time", -2: "bytes that are no HTTP answer"}
        return f"{name.get(self.status, self.status)} {self.body[:200]!r}"

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ValueError: where it is none.
        """
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any] | None:
        """The error object, if the body is exactly an error in OpenAI's form."""
        try:
            body = self.json()
        except ValueError:
            return None
        if not isinstance(body, dict) or set(body) != {"error"}:
            return None
        error = body["error"]
        right = isinstance(error, dict) and set(error) == ERROR_FIELDS and error["message"]
        return error if right else None


def request_bytes(
    address: Address,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Headers = (),
) -> bytes:
    """Return a request that asks for the connection's end.

    `Host`, `Content-Type` and `Content-Length` are added unless they are among the headers; a
    header whose value is empty is left out.
    """
    given = [(name, value) for name, value in headers]
    names = {name.lower() for name, _ in given}
    own = {"Host": address.host_header, "Connection": "close"}
    if body is not None:
        own |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if "transfer-encoding" in names:
            del own["Content-Length"]
    lines = [(name, value) for name, value in own.items() if name.lower() not in names]
    text = f"{method} {path} HTTP/1.1\r\n".encode()
    for name, value in lines + [one for one in given if one[1]]:
        text += name.encode() + b": " + (value if isinstance(value, bytes) else value.encode())
        text += b"\r\n"
    return text + b"\r\n" + (body or b"")


async def exchange(
    address: Address, data: bytes, *, half_close: bool = False, timeout_s: float = ANSWER_S
) -> WireAnswer:
    """Send bytes on a connection of their own and return the first answer.

    Args:
        half_close: say that nothing more will be sent.
    """
    reader, writer = await address.connect()
    sending = asyncio.create_task(_send(writer, data, half_close))
    try:
        async with asyncio.timeout(timeout_s):
            return await read_answer(reader)
    except TimeoutError:
        return WireAnswer(-1)
    finally:
        # A server that has refused a body need not take the rest of it.
        sending.cancel()
        writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, data: bytes, half_close: bool) -> None:
    with suppress(OSError):
        writer.write(data)
        await writer.drain()
        if half_close:
            writer.write_eof()


async def read_answer(reader: asyncio.StreamReader) -> WireAnswer:
    """Read one answer: its head, and its body by its length, by its chunks, or to the end."""
    head = b""
    try:
        while not head.endswith(b"\r\n\r\n"):
            line = await reader.readline()
            if not line:
                return WireAnswer(-2, body=head) if head else WireAnswer(0)
            head += line
    except OSError:
        return WireAnswer(0)
    except ValueError:  # a line without an end
        return WireAnswer(-2, body=head)
    version, _, rest = head.partition(b"\r\n")[0].partition(b" ")
    code = rest[:3]
    if not version.startswith(b"HTTP/") or not code.isdigit():
        return WireAnswer(-2, body=head)
    status = int(code)
    if 100 <= status < 200:
        return await read_answer(reader)
    lines = http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2]))
    headers = {name.lower(): value for name, value in lines.items()}
    body = b""
    with suppress(OSError, asyncio.IncompleteReadError, ValueError):
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
        elif (length := headers.get("content-length")) is not None:
            body = await reader.readexactly(int(length))
        else:
            body = await reader.read()
    return WireAnswer(status, headers, body)
