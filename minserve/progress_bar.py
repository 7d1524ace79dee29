"""`progress_bar`: how far long work has come, as a bar on a terminal and as a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

# Seconds until the first line of a log. Then each line doubles the time, up to the longest pause.
FIRST_LINE_S = 5.0
LONGEST_PAUSE_S = 60.0


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a tqdm bar, which in a file or a pipe becomes few lines.

    Work that ends before the first line is due leaves nothing in a log.

    Args:
        iterable: what to go through; ``None`` where the work calls ``update`` itself.
        options: as for tqdm.
    """
    return (tqdm if is_terminal(options.get("file")) else LogProgress)(iterable, **options)


def is_terminal(stream: TextIO | None = None) -> bool:
    """Return whether bars can be drawn on a stream, by default stderr."""
    stream = stream or sys.stderr
    return stream is not None and stream.isatty()


class LogProgress(tqdm):
    """A tqdm whose states are whole lines, each written when it is due and never erased."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        self._began = self._last_line = time.monotonic()
        self._last_n: float | None = None
        # tqdm's own word for a subclass that shows itself in another way, as tqdm.rich does.
        options |= {"gui": True, "ncols": 0, "mininterval": FIRST_LINE_S, "miniters": 1}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line with the present state if one is due."""
        now = time.monotonic()
        pause = min(LONGEST_PAUSE_S, max(FIRST_LINE_S, self._last_line - self._began))
        if now - self._last_line >= pause:
            self._last_line = now
            self._write(msg)
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Erase nothing: a log keeps its lines."""

    def close(self) -> None:
        """Write the last state, if earlier ones were written and tqdm would leave it."""
        ending = not self.disable and self.leave is not False
        super().close()
        if ending and self._last_n not in (None, self.n):
            self._write()

    def _write(self, msg: str | None = None) -> None:
        self._last_n = self.n
        self.fp.write(f"{str(self) if msg is None else msg}\n")
        self.fp.flush()
