"""langchain-openai."""

from __future__ import annotations

import os

import openai
from client_checks import check, check_raises
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

SETTINGS = {"model": os.environ["MINSERVE_MODEL"], "max_tokens": 16, "temperature": 0,
            "max_retries": 0}  # fmt: skip
chat = ChatOpenAI(**SETTINGS, stream_usage=True)

answer = chat.invoke("Name three colours.")
check("invoke", answer.content and answer.usage_metadata["output_tokens"] == 16, answer.content)

whole = None
for chunk in chat.stream("Name three colours."):
    whole = chunk if whole is None else whole + chunk
check("stream", whole.content == answer.content)
check("usage of a stream", whole.usage_metadata["output_tokens"] == 16, whole.usage_metadata)

both = chat.batch(["Name three colours.", "Name three animals."])
check("batch", both[0].content == answer.content, [one.content for one in both])

chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "Name {what}.")]) | chat
check("a chain", chain.invoke({"what": "a fish"}).content)

scored = chat.bind(logprobs=True, top_logprobs=2).invoke("Hello")
found = scored.response_metadata["logprobs"]["content"]
check("logprobs", len(found[0]["top_logprobs"]) == 2)


@tool
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"Rain in {city}, 12 degrees."


asked = [HumanMessage("What is the weather in Paris?")]
patient = ChatOpenAI(**SETTINGS | {"max_tokens": 64}, stream_usage=True)
forced = patient.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
called = forced.invoke(asked)
check("a tool is called", called.tool_calls[0]["name"] == "weather", called.tool_calls)
whole = None
for chunk in forced.stream(asked):
    whole = chunk if whole is None else whole + chunk
check("the same call as a stream", whole.tool_calls[0]["args"] == called.tool_calls[0]["args"])
result = weather.invoke(called.tool_calls[0])
final = patient.bind_tools([weather]).invoke([*asked, called, result])
check("an answer with the tool's result", final.content, final.content)

check("completions", OpenAI(**SETTINGS).invoke("The capital of France is"))
check_raises("a prompt that is too long", openai.BadRequestError,
             lambda: chat.invoke("one two " * 9000), "maximum context length")  # fmt: skip
