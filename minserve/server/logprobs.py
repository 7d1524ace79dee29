"""Log probabilities in the forms of OpenAI's two endpoints, and in vLLM's form for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minserve.outputs import TokenLogprob
from minserve.server.json_array import JsonArray

if TYPE_CHECKING:
    from minserve.engine.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI's API writes this for "impossible".
LOWEST_LOGPROB = -9999.0
_ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionLogprobs:
    """The completions form: parallel arrays over tokens in a row."""

    __slots__ = ("arrays",)

    def __init__(self) -> None:
        self.arrays = {name: JsonArray() for name in _ARRAYS}

    def __bool__(self) -> bool:
        return bool(self.arrays["tokens"])

    def join(self, other: CompletionLogprobs) -> None:
        """Append the tokens of another one."""
        for name, array in self.arrays.items():
            array.join(other.arrays[name])

    def value(self) -> dict[str, JsonArray]:
        """Return what an answer has as ``logprobs``."""
        return self.arrays


class ChatLogprobs:
    """The chat form: one object per token."""

    __slots__ = ("content",)

    def __init__(self) -> None:
        self.content = JsonArray()

    def __bool__(self) -> bool:
        return bool(self.content)

    def value(self) -> dict[str, JsonArray]:
        """Return what an answer has as ``logprobs``."""
        return {"content": self.content}


class LogprobWriter:
    """Writes log probabilities with the text of their tokens, which the tokenizer gives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Most alternatives come again and again.
        self._names: dict[int, str] = {}
        self._objects: dict[int, dict[str, Any]] = {}

    def completion(
        self,
        into: CompletionLogprobs,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprob | None],
        offsets: Sequence[int],
        num_top: int,
    ) -> None:
        """Append tokens to the completions form.

        A token's dict of alternatives always holds the token itself, so it may have one entry
        more than the client asked for. It is found there by its entry of ``tokens``.

        Args:
            token_ids: the tokens.
            entries: their log probabilities; ``None`` for a prompt's first token.
            offsets: for each token, where it begins in the text.
            num_top: the most likely tokens that are told of each.
        """
        arrays = into.arrays
        arrays["tokens"].extend([self.name(token_id) for token_id in token_ids])
        arrays["token_logprobs"].extend(
            [None if entry is None else _finite(entry.logprob) for entry in entries]
        )
        arrays["top_logprobs"].extend(
            [None if entry is None else self._alternatives(entry, num_top) for entry in entries]
        )
        arrays["text_offset"].extend(offsets)

    def chat(self, into: ChatLogprobs, entries: Sequence[TokenLogprob]) -> None:
        """Append tokens to the chat form."""
        into.content.extend(
            [
                {
                    **self._object(entry.token_id),
                    "logprob": _finite(entry.logprob),
                    "top_logprobs": [
                        {**self._object(token_id), "logprob": _finite(logprob)}
                        for token_id, logprob in entry.top
                    ],
                }
                for entry in entries
            ]
        )

    def prompt(self, into: JsonArray, entries: Sequence[TokenLogprob | None], num_top: int) -> None:
        """Append tokens of a prompt to vLLM's form: by token id, its rank and log probability.

        Each has the token itself and the ``num_top`` most likely ones.
        """
        into.extend([None if one is None else self._by_id(one, num_top) for one in entries])

    def name(self, token_id: int) -> str:
        r"""Return a token's text; as OpenAI ``bytes:\xf0\x9f`` where it is no whole characters."""
        name = self._names.get(token_id)
        if name is None:
            data = self._tokenizer.token_bytes(token_id)
            try:
                name = data.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._names[token_id] = name
        return name

    def _alternatives(self, entry: TokenLogprob, num_top: int) -> dict[str, float]:
        """Return log probabilities by token; as vLLM ``token_id:5`` where another has that text."""
        own, result = self.name(entry.token_id), {}
        for token_id, logprob in entry.top[:num_top]:
            name = self.name(token_id)
            if name in result or (name == own and token_id != entry.token_id):
                name = f"token_id:{token_id}"
            result[name] = _finite(logprob)
        result.setdefault(own, _finite(entry.logprob))
        return result

    def _by_id(self, entry: TokenLogprob, num_top: int) -> dict[int, dict[str, Any]]:
        own = (entry.token_id, entry.logprob)
        ranked = [(entry.rank, own), *enumerate(entry.top[:num_top], 1)]
        result: dict[int, dict[str, Any]] = {}
        for rank, (token_id, logprob) in ranked:
            if token_id not in result:
                result[token_id] = {
                    "logprob": _finite(logprob),
                    "rank": rank,
                    "decoded_token": self.name(token_id),
                }
        return result

    def _object(self, token_id: int) -> dict[str, Any]:
        one = self._objects.get(token_id)
        if one is None:
            data = list(self._tokenizer.token_bytes(token_id))
            one = self._objects[token_id] = {"token": self.name(token_id), "bytes": data}
        return one


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
