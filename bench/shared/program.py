"""What the command lines of programs have in common: values of flags, and an orderly end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from minserve.errors import MinserveError


def names(text: str) -> list[str]:
    """Return the names of a list such as ``dp,edf``."""
    return text.split(",")


def numbers(text: str) -> list[float]:
    """Return the numbers of a list such as ``0.5,1``, each once, in ascending order."""
    return sorted({float(part) for part in text.split(",")})


def positive(text: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, not {text!r}")
    return int(text)


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program to its end, and exit with the status that `main` returns.

    An error that a user can meet is printed without a traceback. SIGTERM ends the program like
    an exception does, so that the processes that it started are ended too.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except MinserveError as error:
        sys.exit(str(error))
