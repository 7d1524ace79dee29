"""OpenAI's Agents SDK, which speaks the Responses API."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from client_checks import check
from openai import AsyncOpenAI
from pydantic import BaseModel

# Traces go to OpenAI.
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
model = OpenAIResponsesModel(os.environ["MINSERVE_MODEL"], client)
rolled: list[int] = []


class SkyColour(BaseModel):
    """The form of an answer."""

    name: Literal["red", "green", "blue"]
    is_warm: bool


@function_tool
def roll(times: Literal[1, 2]) -> str:
    """Roll a die so many times."""
    rolled.append(times)
    return "You rolled a 4."


def agent(**more: object) -> Agent[None]:
    settings = ModelSettings(temperature=0.0, max_tokens=48, **more.pop("settings", {}))  # type: ignore[arg-type]
    return Agent("helper", instructions="Be brief.", model=model, model_settings=settings, **more)  # type: ignore[arg-type]


async def main() -> None:
    plain = agent()
    first = await Runner.run(plain, "Name three colours.")
    check("run", first.final_output, first.final_output)
    usage = first.context_wrapper.usage
    check("usage", usage.input_tokens and usage.output_tokens, usage.total_tokens)

    streamed = Runner.run_streamed(plain, "Name three colours.")
    text = "".join(
        [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
    )
    check("the same as a stream", text == first.final_output == streamed.final_output)

    more = [*first.to_input_list(), {"role": "user", "content": "And three more."}]
    again = await Runner.run(plain, more)  # type: ignore[arg-type]
    check("a conversation that goes on", again.final_output, again.final_output)

    formed = await Runner.run(agent(output_type=SkyColour), "Which colour has the sky?")
    check("an answer of a type", isinstance(formed.final_output, SkyColour), formed.final_output)

    # The model is made to call. The SDK asks it freely once the tool was used.
    forced = {"tool_choice": "required", "parallel_tool_calls": False}
    for run in ("whole", "streamed"):
        rolled.clear()
        tooled = agent(tools=[roll], settings=forced)
        if run == "whole":
            played = await Runner.run(tooled, "Roll a die once and tell the number.")
        else:
            played = Runner.run_streamed(tooled, "Roll a die once and tell the number.")  # type: ignore[assignment]
            async for _ in played.stream_events():  # type: ignore[attr-defined]
                pass
        check(f"a tool that is called, {run}", rolled, rolled)
        items = [item.type for item in played.new_items]
        check("its result is heard of", items[-1] == "message_output_item", items)
        check("an answer behind it", played.final_output, played.final_output)


asyncio.run(main())
