"""pydantic-ai: agents."""

from __future__ import annotations

import asyncio
import os

from client_checks import check, check_raises
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(
    base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
)
model = OpenAIChatModel(os.environ["MINSERVE_MODEL"], provider=provider)
SETTINGS = {"temperature": 0.0, "max_tokens": 16}
agent = Agent(model, instructions="Be brief.", model_settings=SETTINGS)

result = agent.run_sync("Name three colours.")
check("run", result.output, result.output)
check("usage", result.usage.output_tokens > 0, result.usage)


async def streamed() -> str:
    async with agent.run_stream("Name three colours.") as stream:
        return [text async for text in stream.stream_text()][-1]


check("the same as a stream", asyncio.run(streamed()) == result.output)
again = agent.run_sync("And three more.", message_history=result.all_messages())
check("a conversation that goes on", again.output, again.output)

tooled = Agent(model, model_settings=SETTINGS)


@tooled.tool_plain
def roll() -> int:
    """Roll a die."""
    return 4


check_raises("tools are refused by name", ModelHTTPError,
             lambda: tooled.run_sync("Roll a die."), "tool")  # fmt: skip
