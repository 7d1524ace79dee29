"""Makes sure that a long-lived process outlives its stdout and stderr."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


class LossyStream:
    """A text stream that loses what cannot be written, on a full disk for example.

    The modules that write to stderr (progress bars, warnings) would raise the error instead, in
    the middle of what they tell of.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, if that is possible."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError):
            self._stream.flush()


def secure_standard_files() -> None:
    """Open those of stdin, stdout and stderr that are closed, on nothing, and let stderr be lossy.

    In place of a closed one the next file or socket would get what libraries write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    if not isinstance(sys.stderr, LossyStream):
        sys.stderr = cast("TextIO", LossyStream(sys.stderr))
