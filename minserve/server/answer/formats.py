"""The formats of tool calls, by name."""

from __future__ import annotations

from collections.abc import Mapping

from minserve.server.answer.hermes import HermesParser
from minserve.server.answer.llama3 import Llama3Parser
from minserve.server.answer.mistral import MistralParser
from minserve.server.answer.tool_parser import ToolParser

# By the names of `minserve.chat_formats.TOOL_FORMATS`.
TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
}
