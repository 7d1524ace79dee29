"""The parameters that work where there are messages: the chat template's, those of tools and of thinking."""

from __future__ import annotations

from typing import Literal

from minserve.server.parameters.forms import Int64
from minserve.server.parameters.parameter import CHAT, CHATS, MESSAGES, TEMPLATES, working

CHAT_PROMPT = (
    working(
        "add_generation_prompt",
        "V",
        "ends the prompt with the beginning of the assistant's answer",
        endpoints=MESSAGES,
        form=bool,
        default="true",
    ),
    working(
        "continue_final_message",
        "VSL",
        "leaves the last message open, so that the output goes on in it; not with "
        "`add_generation_prompt: true`",
        endpoints=MESSAGES,
        form=bool,
        default="false",
    ),
    working(
        "chat_template_kwargs",
        "VSL",
        'further variables of the chat template, such as `{"enable_thinking": false}`',
        endpoints=TEMPLATES,
        schema={"type": "object"},
        neutral=({},),
        default="none",
    ),
    working(
        "tools",
        "OVSL",
        "[functions that the model may call](agents.md#tools)",
        endpoints=MESSAGES,
        schema={"type": "array", "items": {"$ref": "#/components/schemas/Tool"}},
        neutral=([],),
        by_place=True,
        default="none",
    ),
    working(
        "tool_choice",
        "OVSL",
        "`auto`, `none`, `required`, or an object that names a function or `allowed_tools`",
        endpoints=MESSAGES,
        schema={
            "anyOf": [
                {"enum": ["auto", "none", "required"]},
                {"$ref": "#/components/schemas/NamedTool"},
                {"$ref": "#/components/schemas/AllowedTools"},
            ]
        },
        neutral=("auto",),
        default="`auto`",
    ),
    working(
        "reasoning_effort",
        "OVSL",
        "a variable of the chat template; a hint where that does not know it. `none` is "
        "`enable_thinking: false` then, if it knows that",
        endpoints=MESSAGES,
        form=str | Int64 | float,
        default="the template's own",
    ),
    working(
        "enable_thinking",
        "X",
        "a variable of the chat template; a hint where that does not know it",
        endpoints=TEMPLATES,
        form=bool,
        default="the template's own",
    ),
)

CHAT_ANSWER = (
    working(
        "parallel_tool_calls",
        "OVSL",
        "false: an answer ends behind its first call",
        endpoints=CHATS,
        form=bool,
        default="true",
    ),
    working(
        "parse_tool_calls",
        "L",
        "false: calls stay in the content",
        endpoints=CHAT,
        form=bool,
        default="true",
    ),
    working(
        "include_reasoning",
        "V",
        "false: [thinking](agents.md#thinking) is left out of the answer",
        endpoints=CHAT,
        form=bool,
        default="true",
    ),
    working(
        "separate_reasoning",
        "S",
        "false: thinking stays in the content",
        endpoints=CHAT,
        form=bool,
        default="true",
    ),
    working(
        "reasoning_format",
        "L",
        "`none`: thinking stays in the content; `auto` or `deepseek`: it is told apart",
        endpoints=CHAT,
        form=Literal["none", "auto", "deepseek"],
        default="`auto`",
    ),
)
