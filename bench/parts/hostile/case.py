"""What a case is, what it runs against, and how answers are judged."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from parts.hostile.wire import Address, Headers, WireAnswer, exchange, request_bytes

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES = "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours."}]
# An error may repeat what was sent, but not all of it.
MAX_ERROR_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server.

    Attributes:
        max_model_len: most tokens of a prompt and its output.
        vocab_size: the logits' width.
        max_body: bytes of the largest body.
        max_queue: most outputs that may be queued.
    """

    max_model_len: int
    vocab_size: int
    max_body: int
    max_queue: int


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is tried.

    Attributes:
        pid: the process that listens, where it may be looked at and limited; else ``None``.
        replicas: engines behind the endpoint.
        key: an API key that the server knows; empty where it has none.
        figures: what cases have measured, by name.
    """

    address: Address
    limits: Limits
    pid: int | None = None
    replicas: int = 1
    key: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    async def ask(
        self, method: str, path: str, body: Any = None, headers: Headers = ()
    ) -> WireAnswer:
        """Send one request on a connection of its own.

        Args:
            body: bytes as they are; what else is written as JSON.
            headers: in addition to the usual ones, or in their place. `Authorization` is added.
        """
        sent = [*headers]
        if self.key and not any(name.lower() == "authorization" for name, _ in sent):
            sent.append(("Authorization", f"Bearer {self.key}"))
        return await exchange(
            self.address, request_bytes(self.address, method, path, as_bytes(body), sent)
        )

    async def generate(self, body: dict[str, Any], headers: Headers = ()) -> str:
        """Return the text of a completion.

        Raises:
            ServedWrong: where there is none.
        """
        answer = await self.ask("POST", COMPLETIONS, body, headers)
        if answer.status != 200:
            raise ServedWrong(f"a good request got {answer}")
        return answer.json()["choices"][0]["text"]


def as_bytes(body: Any) -> bytes | None:
    """Return a body as it is sent: bytes as they are, what else as JSON; ``None`` stays none."""
    return body if isinstance(body, bytes) or body is None else json.dumps(body).encode()


class ServedWrong(Exception):
    """A good request was not served, or not rightly."""


Attack = Callable[[Target], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class HostileCase:
    """One thing that a hostile or broken client does.

    Attributes:
        attack: does it; returns what is wrong with the answer, ``None`` if it is right.
        alone: True where nothing else of this program may run beside it.
        slow: True where it takes seconds, so that it is no unit test.
        crowded: True where there are more connections than the server can hold, so that it may close
            one that has asked nothing yet. Whoever has asked is served all the same.
        needs: what the target must have or be: ``pid``, ``replicas``, ``single`` or ``key``.
    """

    family: str
    name: str
    attack: Attack = field(repr=False)
    alone: bool = False
    slow: bool = False
    crowded: bool = False
    needs: str = ""

    def fits(self, target: Target) -> bool:
        """Return whether a target has what the case needs."""
        has = {
            "": True,
            "pid": target.pid is not None,
            "replicas": target.replicas > 1,
            "single": target.replicas == 1,
            "key": bool(target.key),
        }
        return has[self.needs]


Body = Any | Callable[[Limits], Any]


def refused(
    family: str,
    name: str,
    path: str,
    body: Body,
    status: int = 400,
    *,
    method: str = "POST",
    param: str | None = None,
    headers: Headers = (),
    **more: Any,
) -> HostileCase:
    """Return a case whose one request is refused with a status, in the JSON error form.

    Args:
        body: the body, or a function that makes it for a server's limits.
        param: the field that the error must name, or whose part it must name.
    """
    sent = [*headers]

    async def attack(target: Target) -> str | None:
        value = body(target.limits) if callable(body) else body
        data = as_bytes(value)
        # A body over the limit is not read, so nothing in it can be refused.
        if data is not None and len(data) > target.limits.max_body:
            return refusal_problem(await target.ask(method, path, data, sent), 413)
        return refusal_problem(await target.ask(method, path, data, sent), status, param)

    return HostileCase(family, name, attack, **more)


def served(
    family: str,
    name: str,
    path: str,
    body: Body,
    *,
    method: str = "POST",
    headers: Headers = (),
    **more: Any,
) -> HostileCase:
    """Return a case whose request looks bad and is good: it is answered with 200."""
    sent = [*headers]

    async def attack(target: Target) -> str | None:
        value = body(target.limits) if callable(body) else body
        answer = await target.ask(method, path, value, sent)
        return None if answer.status == 200 else f"expected 200, came {answer}"

    return HostileCase(family, name, attack, **more)


def raw(
    family: str, name: str, data: bytes, *statuses: int, may_close: bool = False, **more: Any
) -> HostileCase:
    """Return a case that sends bytes and is refused with one of a few statuses.

    Args:
        data: ``HOST`` in it becomes the server's host and port.
        may_close: True where the connection may also end without any answer: for bytes that are no
            HTTP at all.
    """

    async def attack(target: Target) -> str | None:
        sent = data.replace(b"HOST", target.address.host_header.encode())
        answer = await exchange(target.address, sent, half_close=may_close)
        if may_close and answer.status == 0:
            return None
        if answer.status in statuses:
            return refusal_problem(answer, answer.status)
        wanted = " or ".join(map(str, statuses)) + (" or a close" if may_close else "")
        return f"expected {wanted}, came {answer}"

    return HostileCase(family, name, attack, **more)


def refusal_problem(answer: WireAnswer, status: int, param: str | None = None) -> str | None:
    """Return what is wrong with a refusal; ``None`` if nothing is.

    Args:
        param: the field that it must name; ``None`` where any, or none, will do.
    """
    wanted = f"expected {status} in the JSON error form" + (f" for {param}" if param else "")
    if answer.status != status:
        return f"{wanted}, came {answer}"
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return f"{wanted}, came {answer.headers.get('content-type')}: {answer}"
    error = answer.error
    if error is None:
        return f"{wanted}, came {answer}"
    if len(answer.body) > MAX_ERROR_BYTES:
        return f"{wanted}, came {len(answer.body)} bytes"
    named = str(error["param"]).replace("[", ".").split(".")[0]
    if param is not None and named != param:
        return f"{wanted}, came one for {error['param']}: {answer}"
    return None
