"""`within`: a deadline for work that cannot be interrupted, such as that of another language's library."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_LOOK_S = 0.02


def within(seconds: float, clock: Callable[[], float], work: Callable[[], T]) -> T:
    """Do work in a thread, and wait for it for so many seconds.

    Args:
        clock: tells seconds.

    Raises:
        TimeoutError: when they are over; the thread goes on.
        Exception: whatever the work raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="minserve-structure", daemon=True)
    began = clock()
    thread.start()
    while thread.is_alive() and clock() - began < seconds:
        thread.join(_LOOK_S)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
