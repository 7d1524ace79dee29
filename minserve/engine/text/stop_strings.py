"""`StopMatcher`: finds a stop string in a text that comes piece by piece."""

from __future__ import annotations

from functools import lru_cache


class StopMatcher:
    """The search of Knuth, Morris and Pratt ("Fast pattern matching in strings", 1977).

    A character costs a few steps however long the string is and however much of it has matched,
    so no choice of a stop string makes an output slow.

    Attributes:
        num_matched: the length of the longest end of the text so far that begins the string, but is
            shorter than it.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._borders = _borders(stop)

    def feed(self, text: str) -> int | None:
        """Take the next piece of the text.

        Returns:
            Where the string first ends in this piece; ``None`` where it does not.
        """
        stop, borders, num, end = self.stop, self._borders, self.num_matched, None
        if not num and stop[0] not in text:
            return None
        for place, character in enumerate(text, 1):
            while num and stop[num] != character:
                num = borders[num]
            num += stop[num] == character
            if num == len(stop):
                end = place if end is None else end
                num = borders[num]
        self.num_matched = num
        return end


@lru_cache(maxsize=256)
def _borders(stop: str) -> tuple[int, ...]:
    """Return, for each length, the longest proper beginning of so much of the string that ends it."""
    borders, num = [0, 0], 0
    for character in stop[1:]:
        while num and stop[num] != character:
            num = borders[num]
        num += stop[num] == character
        borders.append(num)
    return tuple(borders)
