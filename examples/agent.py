"""An agent with two tools and one deadline for all of its calls, on a running server (`make serve`).

It needs the official client: `.venv/bin/pip install openai`.

.venv/bin/python examples/agent.py "What are the temperature and the time in Lima?"
"""

import json
import sys
import time
import uuid

from openai import OpenAI

DEGREES = {"Cairo": 31, "Lima": 19, "Oslo": 7}
QUESTION = "What are the temperature and the time in Lima?"
ROUNDS = 1  # of tools; behind them comes the answer


def temperature(city: str) -> str:
    """The temperature of a city."""
    return f"{DEGREES[city]} degrees Celsius in {city}"


def local_time(city: str) -> str:
    """The time of day in a city."""
    hours = {"Cairo": 2, "Lima": -5, "Oslo": 1}
    return time.strftime(f"%H:%M in {city}", time.gmtime(time.time() + 3600 * hours[city]))


TOOLS = {one.__name__: one for one in (temperature, local_time)}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": list(DEGREES)}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS = [
    # "strict": the arguments fit the schema also where the model itself decides to call.
    {"name": name, "description": tool.__doc__, "parameters": CITY, "strict": True}
    for name, tool in TOOLS.items()
]


def run(client: OpenAI, question: str, finish_ms: float = 30_000) -> str:
    """Answer a question with the tools, in `finish_ms` milliseconds from the first call on."""
    # All calls of the task name it, so that the first ones leave time for those to come, and what
    # they have in common stays in the server's cache while a tool runs. A new task has a new id.
    task = {"id": uuid.uuid4().hex, "finish_ms": finish_ms, "calls": ROUNDS + 1}
    messages: list = [{"role": "user", "content": question}]
    for number in range(ROUNDS + 1):
        last = number == ROUNDS
        if last:  # otherwise the embedded model goes on in the style of the calls
            messages.append({"role": "user", "content": "Now answer my question in a sentence."})
        answer = client.chat.completions.create(
            model="smollm2",
            messages=messages,
            tools=[{"type": "function", "function": one} for one in FUNCTIONS],
            # The embedded model is too small to choose a tool by itself, so its first calls are
            # forced. A larger model decides itself with "auto", and ends when it calls none.
            tool_choice="none" if last else "required",
            max_tokens=96,
            temperature=0,
            extra_body={"slo": {"task": task}},
        )
        message = answer.choices[0].message
        print(f"call {number + 1}: {answer.usage.slo['task']}")
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            result = TOOLS[call.function.name](**json.loads(call.function.arguments))
            print(f"  {call.function.name}({call.function.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    raise AssertionError("the last call may use no tool")


if __name__ == "__main__":
    server = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    print(run(server, " ".join(sys.argv[1:]) or QUESTION))
