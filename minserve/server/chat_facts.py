"""`ChatFacts`: what a server knows of the way in which its model thinks, calls tools, and is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minserve.chat_formats import (
    DESCRIBED,
    NONE,
    ReasoningFormat,
    find_reasoning_format,
    find_tool_format,
)
from minserve.config import EngineConfig
from minserve.server.answer.formats import TOOL_PARSERS

if TYPE_CHECKING:
    from minserve.engine.text.template_facts import TemplateFacts
    from minserve.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFacts:
    """What chats depend on besides the request. It can be sent to another process.

    Attributes:
        template: of usual conversations; ``None`` where nothing is known of it.
        tool_template: of conversations with tools, often the same one.
        tool_format: the form of calls, a name of `TOOL_PARSERS`; ``None`` where tools are refused.
        describes_tools: the template knows no tools, or writes calls in an unknown form: the server
            describes them in a message.
        thinking: the markers of the model's thinking, also where answers do not tell it apart.
        separates_thinking: answers tell it apart.
        mark_ids: those markers of calls and thinking that are tokens of their own, with their ids.
        special: those of them that texts leave out.
    """

    template: TemplateFacts | None = None
    tool_template: TemplateFacts | None = None
    tool_format: str | None = DESCRIBED
    describes_tools: bool = True
    thinking: ReasoningFormat | None = None
    separates_thinking: bool = True
    mark_ids: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()

    def template_for(self, *, with_tools: bool) -> TemplateFacts | None:
        """Return what is known of the template of a conversation."""
        return self.tool_template if with_tools else self.template


def find_chat_facts(tokenizer: Tokenizer, config: EngineConfig) -> ChatFacts:
    """Find out about a model; its chat template is tried out for it."""
    template = tokenizer.template_facts()
    tool_template = tokenizer.template_facts(with_tools=True)
    thinking = find_reasoning_format(
        config.reasoning_format,
        template.text,
        lambda text: tokenizer.token_of(text) is not None,
    )
    name, describes = find_tool_format(
        config.tool_format, tool_template.text, shows_tools=tool_template.shows_tools
    )
    markers = [] if name is None else list(TOOL_PARSERS[name].special_markers)
    if thinking is not None:
        markers += [thinking.begin, thinking.end]
    ids = {one: tokenizer.mark_id(one) for one in markers}
    return ChatFacts(
        template=template,
        tool_template=tool_template,
        tool_format=name,
        describes_tools=describes,
        thinking=thinking,
        separates_thinking=config.reasoning_format != NONE,
        mark_ids={one: token for one, token in ids.items() if token is not None},
        special=frozenset(one for one in markers if tokenizer.special_id(one) is not None),
    )
