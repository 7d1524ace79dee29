"""litellm, as a library."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # instead of a table from the network
import litellm
from client_checks import check, check_raises

litellm.telemetry = False
litellm.suppress_debug_info = True
MODEL = f"openai/{os.environ['MINSERVE_MODEL']}"
WHERE = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"],
         "num_retries": 0}  # fmt: skip
MESSAGES = [{"role": "user", "content": "Name three colours."}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "temperature": 0, **WHERE}

answer = litellm.completion(**CHAT)
text = answer.choices[0].message.content
check("a chat", text and answer.usage.completion_tokens == 16, text)

chunks = list(litellm.completion(**CHAT, stream=True, stream_options={"include_usage": True}))
streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
check("the same chat as a stream", streamed == text)
check("gathered by litellm", litellm.stream_chunk_builder(chunks).usage.completion_tokens == 16)

plain = litellm.text_completion(
    model=f"text-completion-{MODEL}", prompt="The capital of France is", max_tokens=8, **WHERE
)
check("a text completion", plain.choices[0].text, plain.choices[0].text)

long = [{"role": "user", "content": "one two " * 9000}]
check_raises("a chat that is too long", litellm.ContextWindowExceededError,
             lambda: litellm.completion(**CHAT | {"messages": long}))  # fmt: skip
check_raises("more output than fits", litellm.ContextWindowExceededError,
             lambda: litellm.completion(**CHAT | {"max_tokens": 10**6}))  # fmt: skip
check_raises("an unknown model", litellm.NotFoundError,
             lambda: litellm.completion(**CHAT | {"model": "openai/other"}))  # fmt: skip
check_raises("a wrong key", litellm.AuthenticationError,
             lambda: litellm.completion(**CHAT | {"api_key": "wrong"}))  # fmt: skip
check_raises("a wrong value", litellm.BadRequestError,
             lambda: litellm.completion(**CHAT | {"top_p": 7}), "top_p")  # fmt: skip
