"""A real HTTP server that plays an OpenAI-compatible one: its answers follow a script."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from waiting import PATIENCE_S

# What it knows beyond these it refuses where it is strict.
OPENAI_FIELDS = {"model", "prompt", "messages", "max_tokens", "temperature", "stream",
                 "stream_options"}  # fmt: skip


@dataclass
class ScriptedServer:
    """How it answers is told by the first word of a prompt's last line: ``refused``, ``busy``,
    ``error``, ``broken``, ``breaks``, ``drops``, ``hangs``, ``short``, ``garbage``, ``long``;
    any other is served.

    Attributes:
        owner: in the list of models; ``minserve`` is sent SLOs.
        usage: ``continuous``, ``final`` or ``none``.
        per_chunk: tokens in each chunk.
        gap_s: between chunks.
        strict: refuse fields that OpenAI's API does not have.
        thinks: accept a pace for thinking.
        key: ask for this key.
        bodies: of all requests that were not probes of one token.
        most_open: streams at once.
        may_go_on: told how many tokens of a stream were sent, whether the next ones may be.
        sent_s: when chunks were sent, on the clock of `time.perf_counter`.
    """

    owner: str = "somebody"
    usage: str = "continuous"
    per_chunk: int = 1
    gap_s: float = 0.0
    strict: bool = False
    thinks: bool = False
    key: str | None = None
    max_model_len: int | None = None
    models: tuple[str, ...] = ("scripted", "other")
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_open: int = 0
    num_open: int = 0
    may_go_on: Callable[[int], bool] = lambda _: True
    sent_s: list[float] = field(default_factory=list)
    hold_until: int = 0  # streams that must be open before any of them goes on
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def list_models(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        card = {"object": "model", "owned_by": self.owner, "max_model_len": self.max_model_len}
        return web.json_response({"data": [{"id": name, **card} for name in self.models]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.strict and (unknown := set(body) - OPENAI_FIELDS):
            return web.json_response({"error": {"message": f"unknown {unknown}"}}, status=400)
        slo = body.get("slo") or {}
        if "thinking_tpot_ms" in slo and not self.thinks:
            return web.json_response({"error": {"message": "no marker"}}, status=400)
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if body["max_tokens"] > 1 or prompt != "Hello":
            self.bodies.append(body)
        word = prompt.splitlines()[-1].split()[0]
        status = {"refused": 429, "busy": 503, "error": 500}.get(word)
        if status is not None:
            return web.json_response({"error": {"message": "scripted"}}, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await self._stream(request, response, body, word)
        finally:
            self.num_open -= 1
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, body: dict[str, Any], word: str
    ) -> None:
        chat, wanted = "messages" in body, body["max_tokens"]
        if word == "hangs":
            await asyncio.Event().wait()
        await response.prepare(request)
        if self.most_open >= self.hold_until:
            self.go_on.set()
        if word != "Hello":
            await self.go_on.wait()
        if word == "garbage":
            await _send(response, ["not an event"])
            return
        total = wanted - 1 if word == "short" else wanted + (word == "long")
        sent = 0
        while sent < total:
            await asyncio.sleep(self.gap_s if sent else 0.0)
            while not self.may_go_on(sent):
                await asyncio.sleep(0.001)
            new = min(self.per_chunk, total - sent)
            sent += new
            text, last = "".join(f"<{sent - new + i}>" for i in range(new)), sent == total
            reason = ("stop" if word == "short" else "length") if last else None
            said = {"delta": {"content": text}} if chat else {"text": text}
            self.sent_s.append(time.perf_counter())
            await _send(response, self._event([{**said, "finish_reason": reason}], body, sent))
            if sent >= 2 and word == "broken":
                await _send(response, {"error": {"message": "out of luck"}})
                return
            if sent >= 2 and word == "breaks":
                return
            if sent >= 2 and word == "drops":
                request.transport.abort()
                return
        if self.usage != "none":
            await _send(response, {"choices": [], "usage": self._usage(body, total)})
        await response.write(b"data: [DONE]\n\n")

    def _event(self, choices: list[Any], body: dict[str, Any], sent: int) -> dict[str, Any]:
        event: dict[str, Any] = {"choices": choices}
        if self.usage == "continuous" and body["stream_options"].get("continuous_usage_stats"):
            event["usage"] = self._usage(body, sent)
        return event

    def _usage(self, body: dict[str, Any], sent: int) -> dict[str, Any]:
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": sent}
        if body.get("slo"):
            usage["slo"] = {"admitted": "relegated" not in prompt}
        return usage


async def _send(response: web.StreamResponse, event: Any) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@contextmanager
def scripted_server(**settings: Any) -> Iterator[ScriptedServer]:
    """Serve on a free port, in a thread of this process."""
    server = ScriptedServer(**settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", server.list_models),
                web.post("/v1/completions", server.complete),
                web.post("/v1/chat/completions", server.complete),
            ]
        )
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        host, port = runner.addresses[0][:2]
        server.url = f"http://{host}:{port}"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(PATIENCE_S)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()
