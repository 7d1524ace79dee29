"""How markers are found in a text that comes piece by piece."""

from __future__ import annotations

from collections.abc import Collection


def split_at(text: str, markers: Collection[str]) -> tuple[str, str, str]:
    """Cut a text at the marker that begins first in it.

    Returns:
        The text before the marker, the marker, and the text behind it; an empty marker where there
        is none, with all the text that is surely no beginning of one before it, and the rest, which
        may become one, behind it.
    """
    found = [(place, marker) for marker in markers if (place := text.find(marker)) >= 0]
    if found:
        place, marker = min(found)
        return text[:place], marker, text[place + len(marker) :]
    place = len(text) - max((overlap(text, marker) for marker in markers), default=0)
    return text[:place], "", text[place:]


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of a text that begins a marker, but is not all of it."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0


def may_become(text: str, marker: str) -> bool:
    """True where a text, perhaps an empty one, is the beginning of a marker but not all of it."""
    return len(text) < len(marker) and marker.startswith(text)
