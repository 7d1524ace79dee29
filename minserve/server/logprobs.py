"""Log probabilities in OpenAI's two forms: parallel arrays, and a list of objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minserve.outputs import TokenLogprob

if TYPE_CHECKING:
    from minserve.engine.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI's API writes this for "impossible".
LOWEST_LOGPROB = -9999.0


class LogprobWriter:
    """Writes log probabilities with the text of their tokens, which the tokenizer gives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def completion(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprob | None],
        offset: int = 0,
    ) -> tuple[dict[str, list[Any]], int]:
        """Return the completions form: parallel arrays over the tokens.

        A token's dict of alternatives always holds the token itself, so it may have one entry
        more than the client asked for. If two tokens have the same text, the key stands for the
        likelier token.

        Args:
            token_ids: the tokens.
            entries: their log probabilities; ``None`` for a prompt's first token.
            offset: characters of token text before the first token.

        Returns:
            The arrays, and the offset after the last token.
        """
        arrays: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = self._tokenizer.token_text(token_id)
            arrays["tokens"].append(text)
            arrays["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            arrays["top_logprobs"].append(None if entry is None else self._alternatives(entry))
            arrays["text_offset"].append(offset)
            offset += len(text)
        return arrays, offset

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Return the chat form: one object per token."""
        return {
            "content": [
                {
                    **self._object(entry.token_id, entry.logprob),
                    "top_logprobs": [self._object(*pair) for pair in entry.top],
                }
                for entry in entries
            ]
        }

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        result: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            result.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        return result

    def _object(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def join_arrays(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Append one completions form to another."""
    return {name: first[name] + second[name] for name in first}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
