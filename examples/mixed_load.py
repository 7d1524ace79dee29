"""Put three kinds of traffic on a running server (`make serve`), and watch its page meanwhile.

Chats want their tokens at a pace, reports want to be whole by a deadline, and background work
wants nothing. Open http://127.0.0.1:8000/ to see what the planner makes of them. It needs the
official client: `.venv/bin/pip install openai`.

.venv/bin/python examples/mixed_load.py --seconds 60
"""

import argparse
import asyncio
import random
from collections import Counter

from openai import APIStatusError, AsyncOpenAI

# What each kind asks for, how long its answers are, and seconds between two of them on average.
KINDS = {
    "chat": ({"ttft_ms": 1500, "tpot_ms": 150}, 48, 1.5),
    "report": ({"finish_ms": 20_000}, 128, 4.0),
    "background": (None, 96, 6.0),
}
QUESTIONS = ("Tell me about tea.", "Write about the sea.", "Explain how bread is made.")


async def ask(client: AsyncOpenAI, kind: str) -> str:
    """Send one request, and return what became of its promise."""
    slo, max_tokens, _ = KINDS[kind]
    try:
        answer = await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": random.choice(QUESTIONS)}],
            max_tokens=max_tokens,
            extra_body={} if slo is None else {"slo": slo},
        )
    except APIStatusError as error:
        return f"refused: {error.status_code}"
    kept = getattr(answer.usage, "slo", None)
    if kept is None:
        return "answered"
    return "kept" if kept["attained"] else "late"


async def run(client: AsyncOpenAI, seconds: float) -> dict[str, Counter]:
    """Send requests of all kinds for so long, and count what became of them."""
    outcomes: dict[str, Counter] = {kind: Counter() for kind in KINDS}

    async def source(kind: str) -> None:
        async def one() -> None:
            outcomes[kind][await ask(client, kind)] += 1

        async with asyncio.TaskGroup() as group:
            while asyncio.get_running_loop().time() < end:
                group.create_task(one())
                await asyncio.sleep(random.expovariate(1 / KINDS[kind][2]))

    end = asyncio.get_running_loop().time() + seconds
    async with asyncio.TaskGroup() as group:
        for kind in KINDS:
            group.create_task(source(kind))
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    settings = parser.parse_args()
    server = AsyncOpenAI(base_url=settings.url, api_key="none")
    for name, counts in asyncio.run(run(server, settings.seconds)).items():
        print(f"{name}: {', '.join(f'{n} {what}' for what, n in counts.items())}")
