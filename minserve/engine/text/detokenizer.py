"""Turns tokens into text as they arrive: whole characters only, and never past a stop string.

The module knows nothing of tokenizers but a ``decode`` function.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from os.path import commonprefix

from minserve.engine.text.plain_tokens import REPLACEMENT, PlainTokens
from minserve.engine.text.stop_strings import StopMatcher
from minserve.sampling_params import SamplingParams

# Prompt tokens decoded before the first output token, so that it gets the space that
# belongs before it; more than one, since special tokens among them are left out.
_PROMPT_CONTEXT = 5
# A UTF-8 character has at most 4 bytes, and a token at least one.
_MAX_CHARACTER_TOKENS = 4


class IncrementalDetokenizer:
    """Turns one output into text, token by token.

    It has two stages. The first decodes a short window of tokens twice, without and with the
    new one, and takes the difference, as text-generation-inference and vLLM do: a token's
    text depends on the tokens before it, so tokens cannot be decoded one by one. A window
    that ends within a character waits for the rest of it. Where a token's text is known to be
    the same behind any text, it is looked up instead. The second looks for stop strings,
    and holds back the longest tail that may be the beginning of one. The cost of a token does not
    grow with the length of the output.

    Attributes:
        num_tokens: output tokens taken so far. Tokens given to `add` behind the one that
            completed a stop string are not taken.
    """

    def __init__(
        self,
        decode: Callable[[list[int], bool], str],
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        plain: PlainTokens | None = None,
    ) -> None:
        """Start after the prompt.

        Args:
            decode: ``decode(token_ids, skip_special_tokens)`` gives the text, with U+FFFD
                for bytes that form no character.
            plain: the vocabulary's tokens of always the same text, where it has such.
        """
        self.num_tokens = 0
        self._plain = plain
        self._decode = decode
        self._params = params
        # Tokens that still matter. The first `_num_read` of them, whose text is
        # `_read_text`, are context: all of it was given to the second stage.
        self._window = list(prompt_token_ids[-_PROMPT_CONTEXT:])
        self._num_read = len(self._window)
        self._read_text = self._text(self._window)
        self._matchers = [StopMatcher(stop) for stop in params.stop]
        self._held_back = ""
        self._stopped = False

    def add(self, token_ids: list[int], may_end: bool = True) -> tuple[str, str | None]:
        """Take new output tokens (without the stop token, which has no text).

        Args:
            may_end: false where a stop string that is complete here is ordinary text.

        Returns:
            The new text that is safe to send, and the stop string that ended the output
            or ``None``. The text ends before the stop string, or with it where
            ``include_stop_str_in_output`` asks for that.
        """
        sent = []
        for token_id in token_ids:
            if self._stopped:
                break
            self.num_tokens += 1
            text, stop = self._release(self._read(token_id), may_end)
            sent.append(text)
            if stop is not None:
                self._stopped = True
                return "".join(sent), stop
        return "".join(sent), None

    def flush(self) -> str:
        """Return the text still held back, at the end of an output that no stop string ended."""
        if self._stopped:
            return ""
        self._stopped = True
        return self._held_back + self._difference(self._text(self._window))

    def pending_text(self) -> str:
        """Return the text, as it is so far, of tokens that wait for the rest of a character."""
        if len(self._window) == self._num_read:
            return ""
        return self._difference(self._text(self._window))

    def _text(self, token_ids: list[int]) -> str:
        return self._decode(token_ids, self._params.skip_special_tokens) if token_ids else ""

    def _difference(self, text: str) -> str:
        """Return what ``text`` of the window adds to the text already read.

        The common part, and not merely the length, is taken off: where the prompt ends
        within a character, the U+FFFD read there turns into that character.
        """
        if text.startswith(self._read_text):
            return text[len(self._read_text) :]
        return text[len(commonprefix((self._read_text, text))) :]

    def _read(self, token_id: int) -> str:
        """Do the first stage: return the text that one more token completes, possibly none."""
        before = self._read_text
        if (
            before
            and self._plain is not None
            and self._num_read == len(self._window)
            and (plain := self._plain[token_id]) is not None
            and not before.endswith(REPLACEMENT)
        ):
            # What the rest of this method comes to where whole characters stand before the token.
            self._window, self._num_read, self._read_text = [token_id], 1, plain.alone
            return plain.behind
        self._window.append(token_id)
        text, end = self._text(self._window), len(self._window)
        if text.endswith(REPLACEMENT):
            end = self._undecided_from(text)
            if end == self._num_read:
                return ""
            text = self._text(self._window[:end])
        new_text = self._difference(text)
        # Tokens without text (special ones) wait for text to follow, a few of them.
        if not new_text and end - self._num_read > _MAX_CHARACTER_TOKENS:
            del self._window[self._num_read : end]
        elif new_text:
            self._window = self._window[self._num_read :]
            self._num_read = end - self._num_read
            self._read_text = self._text(self._window[: self._num_read])
        return new_text

    def _undecided_from(self, text: str) -> int:
        """Return where in the window the tokens begin that may still become a character.

        Normally these are all unread ones. But tokens that no longer can (a model babbling
        bytes) must not pile up: once there are more than a character has bytes, the window is
        cut at the last token border that does not cut a character.
        """
        size = len(self._window)
        if size - self._num_read <= _MAX_CHARACTER_TOKENS:
            return self._num_read
        for cut in range(size - 1, size - _MAX_CHARACTER_TOKENS, -1):
            if self._text(self._window[:cut]) + self._text(self._window[cut:]) == text:
                return cut
        return self._num_read

    def _release(self, new_text: str, may_end: bool) -> tuple[str, str | None]:
        """Do the second stage: split held-back and new text into a safe part and the rest.

        A stop string counts where the newest token completes it and the output may end there,
        however early it began. One that was completed before ``min_tokens`` is ordinary text.
        """
        if not self._matchers:
            return new_text, None
        text = self._held_back + new_text
        ends = [(one.feed(new_text), one.stop) for one in self._matchers]
        if may_end and self.num_tokens >= self._params.min_tokens:
            before = len(self._held_back)
            found = [
                (before + end - len(stop), -len(stop), stop)
                for end, stop in ends
                if end is not None
            ]
            if found:
                at, _, stop = min(found)
                self._held_back = ""
                end = at + len(stop) if self._params.include_stop_str_in_output else at
                return text[:end], stop
        # Text sent before could not begin a stop string, so any match to come begins in
        # this tail or behind it.
        safe = len(text) - max(one.num_matched for one in self._matchers)
        self._held_back = text[safe:]
        return text[:safe], None
