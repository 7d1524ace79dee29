"""What clients ask during a soak: everything that leaves something behind, if anything does."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from minserve.slo.objectives import preset_classes
from minserve.workload.data_files import read_prompts

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BURST = 12
PAUSE_S = 0.3
GOOD = frozenset({200})
# A queue may be full, and an SLO may be out of reach.
MAYBE = frozenset({200, 429})
BAD: list[tuple[str, bytes]] = [
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'),
    (COMPLETIONS, b'{"prompt": [99999999]}'),
    (COMPLETIONS, b'{"prompt": "' + b"word " * 100_000 + b'"}'),
    (CHAT, b'{"messages": [{"role": "wizard", "content": "x"}]}'),
    (CHAT, b'{"messages":' + b"[" * 50_000),
    ("/detokenize", b'{"tokens": [-1]}'),
    ("/nowhere", b"{}"),
]


@dataclass(slots=True)
class Traffic:
    """Clients of all kinds.

    Attributes:
        session: their connections.
        max_model_len: most tokens of a prompt and its output.
        requests: the number of requests sent, by kind.
        problems: answers that should not have come.
    """

    session: aiohttp.ClientSession
    max_model_len: int
    rng: random.Random
    requests: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _prompts: Sequence[str] = field(default_factory=lambda: read_prompts("self_instruct_user"))

    async def for_seconds(self, seconds: float, workers: int) -> None:
        """Keep some workers asking for a time, with one burst in it; returns when all have ended."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        kinds = [self._stream, self._chat, self._many, self._long, self._left, self._given_up,
                 self._bad, self._sampled, self._promised]  # fmt: skip

        async def work() -> None:
            while loop.time() < end:
                await self._guarded(self.rng.choice(kinds))
                await asyncio.sleep(self.rng.uniform(0.0, PAUSE_S))

        async def burst() -> None:
            await asyncio.sleep(seconds / 2)
            await asyncio.gather(*(self._guarded(self._stream) for _ in range(BURST)))

        await asyncio.gather(*(work() for _ in range(workers)), burst())

    async def _guarded(self, kind: Any) -> None:
        name = kind.__name__.removeprefix("_")
        self.requests[name] += 1
        try:
            await kind()
        except (aiohttp.ClientError, OSError, LookupError, ValueError) as error:
            self.problems.append(f"{name}: {type(error).__name__} {error}")

    # --- kinds ---

    async def _stream(self) -> None:
        await self._ask(COMPLETIONS, self._completion(stream=True), GOOD)

    async def _chat(self) -> None:
        messages = [
            {"role": "system", "content": "Answer in few words."},
            {"role": "user", "content": self._prompt()},
        ]
        slo = self.rng.choice([None, *preset_classes()])
        await self._ask(CHAT, {"messages": messages, "max_tokens": 24, "slo": slo,
                               "stream": self.rng.random() < 0.5}, MAYBE)  # fmt: skip

    async def _many(self) -> None:
        await self._ask(COMPLETIONS, self._completion(n=3, logprobs=2, prompt=[self._prompt()] * 2,
                                                      max_tokens=8), GOOD)  # fmt: skip

    async def _long(self) -> None:
        prompt = " ".join(self._prompt() for _ in range(20))
        # Hardly any text has more tokens than half its characters.
        prompt = prompt[: min(6000, self.max_model_len)]
        await self._ask(COMPLETIONS, self._completion(prompt=prompt, max_tokens=4), GOOD)

    async def _left(self) -> None:
        """Leave a long stream after its first events."""
        body = self._completion(max_tokens=self._long_tokens, stream=True, ignore_eos=True)
        async with self.session.post(COMPLETIONS, json=body) as response:
            await self._check(response, MAYBE)
            for _ in range(self.rng.randint(1, 6)):
                await response.content.readline()

    async def _given_up(self) -> None:
        """Give up on a whole answer before it comes."""
        body = self._completion(max_tokens=self._long_tokens, ignore_eos=True)
        try:
            async with asyncio.timeout(self.rng.uniform(0.0, 0.5)):
                await self._ask(COMPLETIONS, body, MAYBE)
        except TimeoutError:
            pass

    async def _bad(self) -> None:
        path, data = self.rng.choice(BAD)
        headers = {"Content-Type": "application/json"}
        async with self.session.post(path, data=data, headers=headers) as response:
            await self._check(response, frozenset({400, 404}))
            await response.read()

    async def _sampled(self) -> None:
        await self._ask(COMPLETIONS, self._completion(
            temperature=0.9, top_p=0.9, top_k=40, seed=self.rng.randrange(2**31), stop=["\n\n", "."],
            presence_penalty=0.5, repetition_penalty=1.1, stream=self.rng.random() < 0.5,
        ), GOOD)  # fmt: skip

    async def _promised(self) -> None:
        """Ask for a promise or a refusal."""
        slo = {"ttft_ms": self.rng.choice([50, 1000, 10_000]), "tpot_ms": 200,
               "on_unattainable": "reject"}  # fmt: skip
        await self._ask(COMPLETIONS, self._completion(slo=slo, stream=True), MAYBE)

    # --- helpers ---

    @property
    def _long_tokens(self) -> int:
        return min(1000, self.max_model_len // 2)

    def _prompt(self) -> str:
        return self.rng.choice(self._prompts)[: min(500, self.max_model_len // 4)]

    def _completion(self, **fields: Any) -> dict[str, Any]:
        return {"prompt": self._prompt(), "max_tokens": self.rng.randint(4, 40), "temperature": 0,
                **fields}  # fmt: skip

    async def _ask(self, path: str, body: dict[str, Any], expected: frozenset[int]) -> None:
        """Ask, and read the whole answer.

        Raises:
            ValueError: where it is not what it should be.
        """
        async with self.session.post(path, json=body) as response:
            await self._check(response, expected)
            raw = await response.read()
        if response.status != 200:
            return
        if body.get("stream"):
            if not raw.endswith(b"data: [DONE]\n\n"):
                raise ValueError(f"a stream ended with {raw[-200:]!r}")
        elif not json.loads(raw)["choices"]:
            raise ValueError("an answer had no choices")

    async def _check(self, response: aiohttp.ClientResponse, expected: frozenset[int]) -> None:
        if response.status not in expected:
            raise ValueError(f"HTTP {response.status}: {(await response.text())[:200]}")
