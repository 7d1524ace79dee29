"""Bytes that are no HTTP, or HTTP of a kind that two servers may read in two ways.

Two readings are what request smuggling lives on: a proxy sees one request, the server behind it two.
"""

from __future__ import annotations

import asyncio
import json

from parts.hostile.case import COMPLETIONS, PROMPT, HostileCase, Target, raw, refusal_problem
from parts.hostile.wire import WireAnswer, exchange, read_answer, request_bytes

BODY = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: HOST\r\n\r\n"
TLS_HELLO = bytes.fromhex(
    "16030100b1010000ad0303" + "5a" * 32 + "20" + "a5" * 32 + "0004130113021301"
    "0000600000000e000c0000096c6f63616c686f7374000a00040002001d"
)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
NAME = "wire"


def _post(
    *headers: bytes, body: bytes = BODY, line: bytes = b"POST /v1/completions HTTP/1.1"
) -> bytes:
    """Return a request of some headers beside `Host` and `Content-Type`."""
    common = (b"Host: HOST", b"Content-Type: application/json")
    return b"\r\n".join([line, *common, *headers]) + b"\r\n\r\n" + body


def _get(
    *headers: bytes, line: bytes = b"GET /health HTTP/1.1", host: bytes = b"Host: HOST"
) -> bytes:
    return b"\r\n".join([line, *([host] if host else []), *headers]) + b"\r\n\r\n"


def _lengths() -> list[HostileCase]:
    """Return bodies whose end is told wrongly, twice, or not at all."""
    length = b"Content-Length: %d" % len(BODY)
    chunked = b"Transfer-Encoding: chunked"
    wrong: dict[str, tuple[bytes, tuple[int, ...]]] = {
        "a length and chunks": (_post(length, chunked, body=CHUNKED + SMUGGLED), (400,)),
        "chunks and a length": (_post(chunked, b"Content-Length: 5", body=CHUNKED), (400,)),
        "two lengths": (_post(length, b"Content-Length: 5"), (400,)),
        "two lengths in one": (_post(b"Content-Length: 5, 7"), (400,)),
        "a negative length": (_post(b"Content-Length: -5"), (400,)),
        "a length with a sign": (_post(b"Content-Length: +5"), (400,)),
        "a length of hex": (_post(b"Content-Length: 0x10"), (400,)),
        "a length of words": (_post(b"Content-Length: five"), (400,)),
        "a length with underscores": (_post(b"Content-Length: 1_0"), (400,)),
        "a length beyond 64 bits": (_post(b"Content-Length: " + b"9" * 30), (400, 413)),
        "a length of other digits": (_post("Content-Length: \uff15".encode()), (400,)),
        "no length": (_post(b"Connection: close", body=b""), (400, 411)),
        "chunks and more": (_post(b"Transfer-Encoding: chunked, identity", body=CHUNKED), (400, 501)),
        "unknown coding": (_post(b"Transfer-Encoding: xchunked", length), (400, 501)),
        "gzip, chunked": (_post(b"Transfer-Encoding: gzip, chunked", body=CHUNKED), (400, 415, 501)),
        "chunks in chunks": (_post(b"Transfer-Encoding: chunked, chunked", body=CHUNKED), (400, 501)),
        "a space before the colon": (_post(b"Transfer-Encoding : chunked", length), (400,)),
        "a folded header": (_post(b"Transfer-Encoding:\r\n chunked", length), (400,)),
        "a size that is no hex": (_post(chunked, body=b"zz\r\nx\r\n0\r\n\r\n"), (400,)),
        "a size with a sign": (_post(chunked, body=b"-5\r\nhello\r\n0\r\n\r\n"), (400,)),
        "a size with 0x": (_post(chunked, body=b"0x5\r\nhello\r\n0\r\n\r\n"), (400,)),
        "a size beyond 64 bits": (_post(chunked, body=b"F" * 17 + b"\r\nx\r\n"), (400, 413)),
        "a size and no line's end": (_post(chunked, body=b"1" * 100_000), (400, 413)),
        "a chunk without its end": (_post(chunked, body=b"5\r\nhelloX\r\n0\r\n\r\n"), (400,)),
        "an extension of megabytes": (
            _post(chunked, body=b"5;a=" + b"x" * 2**21 + b"\r\nhello\r\n0\r\n\r\n"), (400, 413)),
        "a body cut off": (_post(b"Content-Length: 1000"), (400,)),
        "chunks cut off": (_post(chunked, body=b"ff\r\nhello"), (400,)),
    }  # fmt: skip
    cut = {"a body cut off", "chunks cut off", "no length"}
    return [
        raw(NAME, name, data, *statuses, may_close=name in cut)
        for name, (data, statuses) in wrong.items()
    ]


def _heads() -> list[HostileCase]:
    """Return request lines and headers that are malformed or too long."""
    wrong: dict[str, tuple[bytes, tuple[int, ...]]] = {
        "no host": (_get(host=b""), (400,)),
        "two hosts": (_get(b"Host: other"), (400,)),
        "a header without a colon": (_get(b"what is this"), (400,)),
        "a header without a name": (_get(b": value"), (400,)),
        "a space in a name": (_get(b"a b: value"), (400,)),
        "a NUL in a header": (_get(b"x-a: a\x00b"), (400,)),
        "a bare CR in a header": (_get(b"x-a: a\rb"), (400,)),
        "a header of 20 kB": (_get(b"x-a: " + b"a" * 20_000), (431,)),
        "a header of a megabyte": (_get(b"x-a: " + b"a" * 2**20), (431,)),
        "a name of 20 kB": (_get(b"a" * 20_000 + b": x"), (431,)),
        "ten thousand headers": (_get(*(b"x-%d: a" % i for i in range(10_000))), (431,)),
        "a path of 20 kB": (_get(line=b"GET /" + b"a" * 20_000 + b" HTTP/1.1"), (414,)),
        "a query of 20 kB": (_get(line=b"GET /health?" + b"a" * 20_000 + b" HTTP/1.1"), (414,)),
        "a method of 20 kB": (_get(line=b"A" * 20_000 + b" / HTTP/1.1"), (400, 414, 431)),
        "an unknown method": (_get(b"Connection: close", line=b"BREW /health HTTP/1.1"), (400, 405, 501)),
        "a method of signs": (_get(line=b"G@T /health HTTP/1.1"), (400,)),
        "a lower-case version": (_get(line=b"GET /health http/1.1"), (400,)),
        "HTTP/1.9": (_get(b"Connection: close", line=b"GET /nowhere HTTP/1.9"), (400, 404, 505)),
        "HTTP/2.0": (_get(line=b"GET /health HTTP/2.0"), (400, 505)),
        "HTTP/9.9": (_get(line=b"GET /health HTTP/9.9"), (400, 505)),
        "HTTP/0.9": (b"GET /health\r\n\r\n", (400, 505)),
        "no version, a body": (b"POST /v1/completions\r\n\r\n" + BODY, (400, 505)),
        "spaces in a path": (_get(line=b"GET /a b c HTTP/1.1"), (400,)),
        "a path without a slash": (_get(b"Connection: close", line=b"GET health HTTP/1.1"), (400, 404)),
        "a bracket in a URI": (_get(line=b"GET http://[:: HTTP/1.1"), (400,)),
        "CONNECT": (_get(b"Connection: close", line=b"CONNECT 127.0.0.1:22 HTTP/1.1"), (400, 403, 404, 405, 421)),
        "TRACE": (_get(b"Connection: close", line=b"TRACE /health HTTP/1.1"), (405,)),
        "Expect: banana": (_post(b"Expect: banana", b"Content-Length: %d" % len(BODY)), (417,)),
        "a body after Connection: close": (
            _get(b"Connection: close", line=b"GET /nowhere HTTP/1.1") + SMUGGLED, (400, 404)),
        "Expect: 100-continue, too large": (
            _post(b"Expect: 100-continue", b"Content-Length: 999999999", body=b""), (413,)),
    }  # fmt: skip
    return [raw(NAME, name, data, *statuses) for name, (data, statuses) in wrong.items()]


def _no_http() -> list[HostileCase]:
    """Return the beginnings of other protocols, and noise."""
    noise = bytes((i * 89 + i // 7) % 256 for i in range(5000))
    others = {
        "a TLS hello": TLS_HELLO,
        "HTTP/2": HTTP2,
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
        "SMTP": b"EHLO evil.example\r\nMAIL FROM:<a@evil.example>\r\n",
        "Redis": b"*1\r\n$8\r\nFLUSHALL\r\n",
        "noise": noise,
        "noise with line ends": noise.replace(b"\x00", b"\r\n\r\n"),
        "zeros": bytes(100_000),
        "ten thousand line ends": b"\r\n" * 10_000,
        "a request behind line ends": b"\r\n" * 5 + _get(b"Connection: close", line=b"GET /no HTTP/1.1"),
        "nothing": b"",
        "one letter": b"G",
        "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: HOST\r\nContent-Le",
    }  # fmt: skip
    return [
        raw(NAME, name, data, 400, 404, 408, 505, may_close=True) for name, data in others.items()
    ]


async def _pipelined(target: Target) -> str | None:
    """Send fifty requests at once on one connection: good ones and bad ones, in turns."""
    good = request_bytes(target.address, "GET", "/health", headers=[("Connection", "")])
    bad = request_bytes(target.address, "GET", "/nowhere", headers=[("Connection", "")])
    reader, writer = await target.address.connect()
    writer.write((good + bad) * 25)
    try:
        async with asyncio.timeout(60):
            found = [(await read_answer(reader)).status for _ in range(50)]
    except TimeoutError:
        return "pipelined requests were not all answered in time"
    finally:
        writer.transport.abort()
    return None if found == [200, 404] * 25 else f"expected 200 and 404 in turns, came {found}"


async def _smuggled(target: Target) -> str | None:
    """Hide a request behind a body of two lengths: it must not be answered."""
    data = _post(b"Content-Length: 4", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED)
    reader, writer = await target.address.connect()
    writer.write(data.replace(b"HOST", target.address.host_header.encode()))
    try:
        async with asyncio.timeout(60):
            first, second = await read_answer(reader), await read_answer(reader)
    except TimeoutError:
        return "the connection stayed open behind a body of two lengths"
    finally:
        writer.transport.abort()
    if second.status != 0:
        return f"a smuggled request was answered: {second}"
    return refusal_problem(first, 400)


async def _upgraded(target: Target) -> str | None:
    """Ask for other protocols on a request: the server stays with HTTP/1.1."""
    for protocol in ("websocket", "h2c", "TLS/1.0"):
        answer: WireAnswer = await exchange(
            target.address,
            request_bytes(
                target.address,
                "GET",
                "/health",
                headers=[("Connection", "Upgrade, close"), ("Upgrade", protocol)],
            ),
        )
        if answer.status not in (200, 400, 426):
            return f"expected 200, 400 or 426 for an upgrade to {protocol}, came {answer}"
    return None


async def _continued(target: Target) -> str | None:
    """Send a body without waiting for ``100 Continue``: it is served all the same."""
    data = _post(b"Expect: 100-continue", b"Connection: close", b"Content-Length: %d" % len(BODY))
    sent = data.replace(b"HOST", target.address.host_header.encode())
    answer = await exchange(target.address, sent)
    return None if answer.status == 200 else f"expected 200 for {COMPLETIONS}, came {answer}"


def cases() -> list[HostileCase]:
    """Return all cases of bytes."""
    return [
        *_lengths(),
        *_heads(),
        *_no_http(),
        HostileCase(NAME, "fifty pipelined requests", _pipelined),
        HostileCase(NAME, "a smuggled request", _smuggled),
        HostileCase(NAME, "upgrades", _upgraded),
        HostileCase(NAME, "a body before 100 Continue", _continued),
    ]
