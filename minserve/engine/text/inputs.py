"""`PromptProcessor` turns a prompt, as a caller gives it, into checked token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minserve.engine.text.bad_words import bad_word_ids
from minserve.errors import InvalidRequestError, RequestTooLongError
from minserve.prompts import BadWordIds, Prompt, PromptOptions, TokenizedPrompt

if TYPE_CHECKING:
    from minserve.engine.structures.check import StructureCheck
    from minserve.engine.text.tokenizer import Tokenizer


# The longest text that is tokenized to its end before its length is known, in characters for each
# token that fits. Of a longer one the beginning is tokenized first.
_PROBE_CHARACTERS = 8
# So many times more tokens than fit, a beginning must have: where it is cut off, its tokens may
# differ from those of the whole text.
_PROBE_MARGIN = 1.25
_USUAL = PromptOptions()
# What a chat template sees of the conversation itself, and arguments of transformers' function that
# runs it.
_OWN_VARIABLES = frozenset(
    {
        "messages",
        "conversations",
        "tools",
        "documents",
        "chat_template",
        "return_assistant_tokens_mask",
    }
)


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

    def process(self, prompt: Prompt, options: PromptOptions = _USUAL) -> TokenizedPrompt:
        """Check one prompt and turn it into token ids.

        Args:
            prompt: a text, token ids, the messages of a chat, or what this method has returned.

        Returns:
            The prompt with at least one token and fewer than ``max_model_len``, all of them in the
            vocabulary.

        Raises:
            RequestTooLongError: where no room is left for an output.
            InvalidRequestError: for any other prompt that cannot be run.
        """
        if isinstance(prompt, TokenizedPrompt):
            return prompt
        if isinstance(prompt, str):
            special = options.add_special_tokens is not False
            ids: Sequence[Any] = self._encode(prompt, "prompt", special, options)
            return self._checked(prompt, ids, "prompt", options)
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequestError(
                "a prompt is a text, a list of token ids or a list of messages, "
                f"not {type(prompt).__name__}",
                "prompt",
            )
        if prompt and isinstance(prompt[0], Mapping):
            text = self._render(prompt, options)
            # The template has written the special tokens already.
            ids = self._encode(text, "messages", bool(options.add_special_tokens), options)
            return self._checked(text, ids, "messages", options)
        return self._checked(None, prompt, "prompt", options)

    def bad_word_ids(self, words: Sequence[str]) -> BadWordIds:
        """Return the token sequences of bad words, as `minserve.engine.text.bad_words` does."""
        return bad_word_ids(words, self._tokenizer, self._vocab_size)

    def structure_check(self) -> StructureCheck:
        """Return what checks structures for this model."""
        from minserve.engine.structures.check import StructureCheck

        return StructureCheck(self._tokenizer)

    def tokenize(self, prompt: Prompt, options: PromptOptions = _USUAL) -> TokenizedPrompt:
        """Turn a text or messages into token ids, as many as there are and perhaps none.

        Raises:
            InvalidRequestError: for messages that the chat template refuses.
        """
        if isinstance(prompt, str):
            text, special = prompt, options.add_special_tokens is not False
        else:
            text, special = self._render(prompt, options), bool(options.add_special_tokens)
        ids = self._tokenizer.encode(text, add_special_tokens=special)
        return TokenizedPrompt(text, tuple(ids))

    def _render(self, messages: Any, options: PromptOptions) -> str:
        if taken := _OWN_VARIABLES & options.template_kwargs.keys():
            raise InvalidRequestError(
                f"chat_template_kwargs: {min(taken)!r} cannot be set there", "chat_template_kwargs"
            )
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequestError(
                    f"message {i} must be an object with a 'role', not {message!r:.80}", "messages"
                )
        return self._tokenizer.render_chat(
            messages,
            **{
                **options.template_kwargs,
                **({"tools": list(options.tools)} if options.tools else {}),
                "add_generation_prompt": options.add_generation_prompt,
                "continue_final_message": options.continue_final_message,
            },
        )

    def _encode(
        self, text: str, param: str, add_special_tokens: bool, options: PromptOptions
    ) -> Sequence[int]:
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
        if options.truncate_prompt_tokens is None:
            self._probe(text, param)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _probe(self, text: str, param: str) -> None:
        """Refuse a long text whose beginning alone is too long."""
        num_characters = _PROBE_CHARACTERS * self._max_model_len
        if len(text) <= num_characters:
            return
        beginning = self._tokenizer.encode(text[:num_characters], add_special_tokens=False)
        if len(beginning) > _PROBE_MARGIN * self._max_model_len:
            raise self._too_long(f"more than {self._max_model_len}", param)

    def _truncated(self, ids: Sequence[Any], options: PromptOptions) -> Sequence[Any]:
        most = options.truncate_prompt_tokens
        if most is None:
            return ids
        most = self._max_model_len - 1 if most == -1 else most
        return ids[-most:]

    def _checked(
        self, text: str | None, ids: Sequence[Any], param: str, options: PromptOptions
    ) -> TokenizedPrompt:
        kept = self._truncated(ids, options)
        # The text of what was cut is no part of the prompt.
        return TokenizedPrompt(text if len(kept) == len(ids) else None, self._ids(kept, param))

    def _ids(self, ids: Sequence[Any], param: str) -> tuple[int, ...]:
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
