"""Several requests at once inside an asyncio program, one of them abandoned half-way.

.venv/bin/python examples/async_engine.py
"""

import asyncio

from minserve import AsyncEngine, SamplingParams


async def ask(engine: AsyncEngine, question: str, stop_after: int | None = None) -> None:
    """Print the answer; leaving the loop early aborts the request and frees its memory."""
    text = ""
    messages = [{"role": "user", "content": question}]
    params = SamplingParams(temperature=0.0, max_tokens=48)
    async for delta in engine.generate(messages, params):
        text += delta.text
        if stop_after is not None and len(text) >= stop_after:
            text += " ..."
            break
    print(f"{question}\n  {text.strip()}")


async def main() -> None:
    engine = AsyncEngine("smollm2")
    await engine.start()
    try:
        await asyncio.gather(
            ask(engine, "What is the capital of France?"),
            ask(engine, "Name three colours."),
            ask(engine, "Tell me a long story.", stop_after=60),
        )
    finally:
        await engine.stop()


if __name__ == "__main__":
    asyncio.run(main())
