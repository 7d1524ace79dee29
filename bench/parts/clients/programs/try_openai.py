"""The official Python client."""

from __future__ import annotations

import asyncio
import json
import os

import openai
from client_checks import check, check_raises

MODEL = os.environ["MINSERVE_MODEL"]
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Name three colours."}],
        "max_tokens": 16, "temperature": 0}  # fmt: skip
client = openai.OpenAI(max_retries=0)

(card,) = client.models.list().data
check("models.list", card.id == MODEL)
check("models.retrieve", client.models.retrieve(MODEL).id == MODEL)

answer = client.chat.completions.create(**CHAT)
text = answer.choices[0].message.content
check("a chat", text and answer.usage.completion_tokens == 16, text)

chunks = list(client.chat.completions.create(**CHAT, stream=True,
                                             stream_options={"include_usage": True}))  # fmt: skip
streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
check("the same chat as a stream", streamed == text)
check("its usage in the last chunk", chunks[-1].usage.total_tokens == answer.usage.total_tokens)
# It takes an answer that ends by its length for an error.
with client.chat.completions.stream(**CHAT, stop=[":"]) as events:
    whole = events.get_final_completion().choices[0].message.content
check("the client's own way to gather a stream", whole == text.split(":")[0], whole)

several = client.chat.completions.create(**CHAT | {"n": 3, "temperature": 1, "seed": 7})
check("n outputs", sorted(one.index for one in several.choices) == [0, 1, 2])
scored = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0]
check("logprobs of a chat", [len(one.top_logprobs) for one in scored.logprobs.content] == [2] * 16)

prompts = ["The capital of France is", "One, two, three,"]
ended = client.completions.create(model=MODEL, prompt=prompts, max_tokens=8, temperature=0,
                                  logprobs=1, stop=["\n"])  # fmt: skip
check("a list of prompts", [one.index for one in ended.choices] == [0, 1],
      [one.text for one in ended.choices])  # fmt: skip


async def at_once() -> list[str]:
    async with openai.AsyncOpenAI(max_retries=0) as many:
        answers = await asyncio.gather(*(many.chat.completions.create(**CHAT) for _ in range(4)))
    return [one.choices[0].message.content for one in answers]


check("four chats at once", asyncio.run(at_once()) == [text] * 4)

create = client.chat.completions.create
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"], "additionalProperties": False}, "strict": True}}  # fmt: skip
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
         "tools": [TOOL], "max_tokens": 64, "temperature": 0}  # fmt: skip
for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
    told = create(**ASKED, tool_choice=choice, parallel_tool_calls=False).choices[0]
    (call,) = told.message.tool_calls
    check("a tool is called", told.finish_reason == "tool_calls", call.function)
with client.chat.completions.stream(**ASKED, tool_choice="required",
                                    parallel_tool_calls=False) as events:  # fmt: skip
    (same,) = events.get_final_completion().choices[0].message.tool_calls
check("the same call as a stream, with its arguments parsed",
      same.function.parsed_arguments == json.loads(call.function.arguments))  # fmt: skip
result = {"role": "tool", "tool_call_id": call.id, "content": "Rain, 12 degrees."}
after = create(**ASKED | {"messages": [*ASKED["messages"], told.message, result]}).choices[0]
check("an answer with the tool's result", after.message.content, after.message.content)
check_raises("a tool that does not exist", openai.BadRequestError,
             lambda: create(**ASKED, tool_choice={"type": "function", "function": {"name": "x"}}),
             "tool_choice")  # fmt: skip

check_raises("an unknown model", openai.NotFoundError, lambda: create(**CHAT | {"model": "other"}))
check_raises(
    "a wrong value", openai.BadRequestError, lambda: create(**CHAT | {"top_p": 7}), "top_p"
)
check_raises("a prompt that is too long", openai.BadRequestError,
             lambda: client.completions.create(model=MODEL, prompt="one two " * 9000),
             "context_length_exceeded")  # fmt: skip
wrong = openai.OpenAI(api_key="wrong", max_retries=0)
check_raises("a wrong key", openai.AuthenticationError, wrong.models.list)
