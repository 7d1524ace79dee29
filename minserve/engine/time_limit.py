"""`TimeLimit`: interrupts Python code of another thread that takes too long."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType


class TimeLimitError(Exception):
    """Raised inside the code that took too long."""

    def __init__(self) -> None:
        super().__init__("it took too long")


class TimeLimit:
    """A piece of work that may be interrupted: ``with`` it, the work is done in one thread, and any
    other thread calls `enforce` now and then.

    Python raises an asynchronous exception between two steps of its bytecode. Work that hangs
    inside one call of C is therefore not interrupted. At the end of the ``with`` no exception is on
    its way any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began_s: float | None = None
        self._thread_id = 0
        self._is_raised = False

    def __enter__(self) -> None:
        self._thread_id, self._is_raised = threading.get_ident(), False
        self._began_s = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Without the lock: either the other thread sees this, or this thread sees its exception.
        self._began_s = None
        with self._lock:
            is_raised = self._is_raised
        if is_raised and kind is not TimeLimitError:
            # It arrives at one of these steps. The work has ended, but too late.
            for _ in range(1000):
                time.sleep(0.001)

    def enforce(self, seconds: float) -> bool:
        """Interrupt the work if it has taken longer; return whether it was interrupted now."""
        with self._lock:
            began_s = self._began_s
            if began_s is None or self._is_raised or time.monotonic() - began_s < seconds:
                return False
            self._is_raised = True
            target = ctypes.c_ulong(self._thread_id)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(TimeLimitError))
            return True
