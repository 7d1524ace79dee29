"""`FailureLog`: what failed in a series of measurements, with the traceback of each kind once."""

from __future__ import annotations

import sys
import traceback


class FailureLog:
    """Failures of a series that goes on behind each of them.

    Attributes:
        lines: what failed and why, a line for each failure.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[tuple[str, ...], str] = {}

    def add(self, name: str, error: Exception) -> None:
        """Take up that one of the series failed.

        Its traceback goes to stderr; where an earlier failure had the same, a line says so instead.
        """
        self.lines.append(f"{name}: {type(error).__name__}: {error}")
        trace = tuple(traceback.format_exception(error))
        first = self._known.setdefault(trace, name)
        if first is name:
            print(f"{name} failed:\n{''.join(trace)}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{name} failed as {first} did: {error}", file=sys.stderr, flush=True)
