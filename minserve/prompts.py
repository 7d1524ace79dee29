"""Prompts: as callers give them, with options, and as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """How a prompt becomes token ids, where a caller wants it otherwise than usual.

    Attributes:
        add_special_tokens: add what the model wants around a text (often a BOS); ``None`` does so
            for texts, but not for chats, whose template writes the special tokens itself.
        add_generation_prompt: of a chat: end with the beginning of the assistant's answer.
        continue_final_message: of a chat: leave the last message open, so that the output goes on
            in it. Needs ``add_generation_prompt`` to be false.
        template_kwargs: of a chat: further variables of its template.
        tools: of a chat: the tools that its template describes, in OpenAI's form.
        truncate_prompt_tokens: keep so many tokens of a longer prompt, the last ones; -1 keeps as
            many as leave room for one token of output. ``None`` refuses a prompt that is too long.
    """

    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    truncate_prompt_tokens: int | None = None


class TokenizedPrompt(NamedTuple):
    """A prompt that was checked against a model and tokenized.

    Attributes:
        text: the prompt as text, for a chat as the template wrote it; ``None`` where it was given
            as token ids, or truncated.
        token_ids: at least one, and fewer than the model's length.
    """

    text: str | None
    token_ids: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # As an array the ids of a long prompt travel between processes ten times as fast.
        return _from_array, (self.text, array("I", self.token_ids))


def _from_array(text: str | None, token_ids: array[int]) -> TokenizedPrompt:
    return TokenizedPrompt(text, tuple(token_ids))


# The token sequences that an output must not hold.
BadWordIds = tuple[tuple[int, ...], ...]
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | TokenizedPrompt
