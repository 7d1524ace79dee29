"""`PromptProcessor` turns a prompt, as a caller gives it, into checked token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minserve.errors import InvalidRequestError, RequestTooLongError

if TYPE_CHECKING:
    from minserve.engine.text.tokenizer import Tokenizer


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
        truncate_prompt_tokens: keep so many tokens of a longer prompt, the last ones; -1 keeps as
            many as leave room for one token of output. ``None`` refuses a prompt that is too long.
    """

    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    truncate_prompt_tokens: int | None = None


class PromptProcessor:
    """Checks prompts and tokenizes them. Keeps no state between calls; any thread may call."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_model_len: int) -> None:
        """Make a processor for one model.

        Args:
            tokenizer: the model's.
            vocab_size: rows of the model's embedding.
            max_model_len: most tokens of prompt and output together.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def process(
        self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    ) -> tuple[str | None, tuple[int, ...]]:
        """Check one prompt and turn it into token ids.

        Args:
            prompt: a text, token ids, or the messages of a chat.

        Returns:
            The text (for a chat: as the template wrote it; ``None`` for token ids), and the
            token ids: at least one, fewer than ``max_model_len``, all in the vocabulary.

        Raises:
            RequestTooLongError: where no room is left for an output.
            InvalidRequestError: for any other prompt that cannot be run.
        """
        param = "prompt"
        text: str | None = None
        ids: Sequence[Any] = ()
        if isinstance(prompt, str):
            text, ids = prompt, self._encode(prompt, param, add_special_tokens=True)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequestError(
                "a prompt is a text, a list of token ids or a list of messages, "
                f"not {type(prompt).__name__}",
                "prompt",
            )
        elif prompt and isinstance(prompt[0], Mapping):
            param = "messages"
            text = self._render(prompt)
            # The template has written the special tokens already.
            ids = self._encode(text, param, add_special_tokens=False)
        else:
            ids = prompt
        return text, self._checked_ids(ids, param)

    def _render(self, messages: Sequence[Any]) -> str:
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequestError(
                    f"message {i} must be an object with a 'role', not {message!r:.80}", "messages"
                )
        return self._tokenizer.render_chat(messages)

    def _encode(self, text: str, param: str, *, add_special_tokens: bool) -> Sequence[int]:
        if not text:
            raise InvalidRequestError("the prompt is empty", param)
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"character {error.start} of the prompt is half of a surrogate pair "
                f"(U+{ord(text[error.start]):04X}), which is no text",
                param,
            ) from error
        # Tokenizing takes a second per megabyte or so, so a text that cannot fit, even were
        # all its tokens the longest there is, is refused before it.
        fewest_tokens = -(-size // self._tokenizer.max_token_bytes)
        if fewest_tokens >= self._max_model_len:
            raise self._too_long(f"at least {fewest_tokens}", param)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _checked_ids(self, ids: Sequence[Any], param: str) -> tuple[int, ...]:
        if not ids:
            raise InvalidRequestError("the prompt is empty", param)
        if len(ids) >= self._max_model_len:
            raise self._too_long(str(len(ids)), param)
        for i, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise InvalidRequestError(
                    f"token {i} of the prompt must be an integer, not {token!r:.80}", param
                )
            if not 0 <= token < self._vocab_size:
                raise InvalidRequestError(
                    f"token {i} of the prompt is {token!r:.40}, outside the vocabulary "
                    f"(0 to {self._vocab_size - 1})",
                    param,
                )
        return tuple(ids)

    def _too_long(self, tokens: str, param: str) -> RequestTooLongError:
        # Clients know an overflow by these words of OpenAI's, or by its code in them.
        return RequestTooLongError(
            f"This model's maximum context length is {self._max_model_len} tokens. However, your "
            f"{param} resulted in {tokens} tokens, and the output needs one more. Please reduce "
            f"the length of the {param}. (context_length_exceeded)",
            param,
        )
