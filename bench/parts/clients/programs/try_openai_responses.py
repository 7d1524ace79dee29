"""OpenAI's Python client, with its Responses API."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Literal

import openai
from client_checks import check, check_raises
from pydantic import BaseModel

MODEL = os.environ["MINSERVE_MODEL"]
client = openai.OpenAI(max_retries=0)
create = client.responses.create
ASKED = {"model": MODEL, "instructions": "Be brief.", "input": "Name three colours.",
         "temperature": 0, "max_output_tokens": 24}  # fmt: skip

answer = create(**ASKED)
check("a response", answer.output_text, answer.output_text)
check("its usage", answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens,
      answer.usage.total_tokens)  # fmt: skip
chat = client.chat.completions.create(
    model=MODEL, temperature=0, max_tokens=24, messages=[
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name three colours."}])  # fmt: skip
check("the chat that it stands for", chat.choices[0].message.content == answer.output_text)
events = list(create(stream=True, **ASKED))
deltas = [one.delta for one in events if one.type == "response.output_text.delta"]
check("the same as a stream", "".join(deltas) == answer.output_text, events[-1].type)

history = [{"role": "user", "content": "Name three colours."}, *answer.output,
           {"role": "user", "content": "And three more."}]  # fmt: skip
again = create(**ASKED | {"input": history})
check("a conversation that goes on", again.output_text, again.output_text)
told = create(include=["message.output_text.logprobs"], top_logprobs=2, **ASKED)
tokens = [one.token for one in told.output[0].content[0].logprobs]
check("log probabilities of the text", "".join(tokens) == told.output_text, len(tokens))


class OneColour(BaseModel):
    """The form of an answer."""

    name: Literal["red", "green", "blue"]
    is_warm: bool


parsed = client.responses.parse(
    text_format=OneColour, **ASKED | {"input": "Which colour has the sky?"}
)
check("an answer of a type", isinstance(parsed.output_parsed, OneColour), parsed.output_parsed)
TOOL = {"type": "function", "name": "weather", "description": "The weather in a city.", "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                       "required": ["city"], "additionalProperties": False}}  # fmt: skip
question = {"role": "user", "content": "What is the weather in Paris?"}
BODY = {**ASKED, "input": [question], "tools": [TOOL], "max_output_tokens": 64}
forced = create(tool_choice="required", parallel_tool_calls=False, **BODY)
(call,) = forced.output
check("a tool is called", call.type == "function_call" and call.name == "weather", call.arguments)
with client.responses.stream(tool_choice="required", parallel_tool_calls=False, **BODY) as stream:
    for _ in stream:
        pass
    (same,) = stream.get_final_response().output
check("the same call as a stream, with its arguments parsed",
      same.parsed_arguments == json.loads(call.arguments))  # fmt: skip
result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain, 12 degrees."}
after = create(**BODY | {"input": [question, call, result]})
check("an answer with the tool's result", after.output_text, after.output_text)


async def at_once() -> list[str]:
    async with openai.AsyncOpenAI(max_retries=0) as many:
        answers = await asyncio.gather(*(many.responses.create(**ASKED) for _ in range(4)))
    return [one.output_text for one in answers]


check("four at once", asyncio.run(at_once()) == [answer.output_text] * 4)
check_raises("a response that would be stored", openai.NotFoundError,
             lambda: client.responses.retrieve(answer.id), "not stored")  # fmt: skip
check_raises("a conversation that would be stored", openai.BadRequestError,
             lambda: create(previous_response_id=answer.id, **ASKED), "whole conversation")  # fmt: skip
check_raises("a tool of OpenAI's own", openai.BadRequestError,
             lambda: create(tools=[{"type": "web_search"}], **ASKED), "runs no tools")  # fmt: skip
check_raises("an unknown model", openai.NotFoundError, lambda: create(**ASKED | {"model": "other"}))
