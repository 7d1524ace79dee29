"""Checks that are printed as they are made; the first one that fails ends the program."""

from __future__ import annotations

import sys
from collections.abc import Callable


def check(what: str, true: object, told: object = "") -> None:
    """Print a check; end the program with 1 if it is not true.

    Args:
        told: what the server said, printed behind it.
    """
    print(f"{'ok' if true else 'FAILED'}: {what}{f': {told}' if told != '' else ''}", flush=True)
    if not true:
        sys.exit(1)


def check_raises(
    what: str, kind: type[BaseException], act: Callable[[], object], *words: str
) -> None:
    """Check that an act raises an exception of a kind, with these words in its text."""
    try:
        act()
    except kind as error:
        text = " ".join(str(error).split())
        check(f"{what}: {kind.__name__}", all(word in text for word in words), text[:300])
    except Exception as error:
        check(f"{what}: {kind.__name__}", False, f"{type(error).__name__}: {error}"[:300])
    else:
        check(f"{what}: {kind.__name__}", False, "nothing was raised")
