"""pydantic-ai: agents."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from client_checks import check
from pydantic import BaseModel
from pydantic_ai import Agent, RunContext, Tool
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

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


class Roll(BaseModel):
    """What was rolled."""

    number: Literal[1, 2, 3, 4, 5, 6]


rolled: list[int] = []


def roll(times: Literal[1, 2]) -> str:
    """Roll a die so many times."""
    rolled.append(times)
    return "You rolled a 4."


# The model is made to call: the die first, and then the tool that gives the answer.
PATIENT = {**SETTINGS, "max_tokens": 64, "parallel_tool_calls": False}


async def unless_rolled(_: RunContext[None], tool: ToolDefinition) -> ToolDefinition | None:
    """Leave the die out once it was rolled."""
    return None if rolled else tool


tooled = Agent(
    model,
    output_type=Roll,
    tools=[Tool(roll, prepare=unless_rolled)],
    model_settings=PATIENT,
    retries=3,
)
played = tooled.run_sync("Roll a die once and tell the number.")
check("an answer that is a tool's call", played.output.number in range(1, 7), played.output)
check("the calls on the way", True, [
    (part.tool_name, part.args) for message in played.all_messages() for part in message.parts
    if part.part_kind == "tool-call"])  # fmt: skip
