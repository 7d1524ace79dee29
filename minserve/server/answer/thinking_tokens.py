"""`ThinkingTokens`: counts the tokens of an output's thinking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minserve.chat_formats import ReasoningFormat


class ThinkingTokens:
    """Counts the tokens between the markers, which are not counted themselves.

    It looks at the bytes of each token, so that it is exact however many tokens come at once, and
    where a marker is several tokens.

    Attributes:
        is_over: the thinking has ended, or there was none: no token changes the count any more.
    """

    def __init__(
        self, form: ReasoningFormat, token_bytes: Callable[[int], bytes], *, is_open: bool
    ) -> None:
        """Begin at the beginning of an output.

        Args:
            token_bytes: gives the bytes of a token, special tokens as they are written.
            is_open: the prompt ends within the thinking.
        """
        self.is_over = False
        self._count = 0
        self._begin, self._end = form.begin.encode(), form.end.encode()
        self._token_bytes = token_bytes
        self._is_open = is_open
        self._begins = True  # it is not decided yet whether the output begins with the marker
        # The newest bytes, and where in them each token ends that they are of.
        self._tail = b""
        self._ends: list[int] = []

    @property
    def count(self) -> int:
        """The tokens of the thinking so far."""
        return 0 if self._begins and not self._is_open else self._count

    def add(self, token_ids: Sequence[int]) -> None:
        """Count an output's next tokens."""
        for token_id in token_ids:
            if self.is_over:
                return
            self._tail += self._token_bytes(token_id)
            self._ends.append(len(self._tail))
            self._count += 1
            if self._begins:
                self._decide()
            if not self._begins and not self.is_over:
                self._look_for_end()

    def _decide(self) -> None:
        """Decide whether the output begins with the marker."""
        inner = self._tail.lstrip()
        if len(inner) < len(self._begin) and self._begin.startswith(inner):
            return
        self._begins = False
        if inner.startswith(self._begin):
            self._drop(len(self._tail) - len(inner) + len(self._begin))
        elif not self._is_open:
            self._count, self.is_over = 0, True

    def _drop(self, size: int) -> None:
        """Forget so many bytes, which are no thinking, and the tokens that are all in them."""
        self._count = sum(end > size for end in self._ends)
        self._ends = [end - size for end in self._ends if end > size]
        self._tail = self._tail[size:]

    def _look_for_end(self) -> None:
        place = self._tail.find(self._end)
        if place >= 0:
            starts = [0, *self._ends[:-1]]
            self._count -= sum(start >= place for start in starts)
            self.is_over = True
            return
        kept = len(self._end) - 1
        while len(self._ends) > 1 and len(self._tail) - self._ends[0] >= kept:
            size = self._ends.pop(0)
            self._tail = self._tail[size:]
            self._ends = [end - size for end in self._ends]
