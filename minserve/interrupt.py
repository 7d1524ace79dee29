"""`Interrupt`: Ctrl-C, taken between two steps of the work instead of anywhere in them."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """Notes the first Ctrl-C until `check` raises it; a second one acts at once, as it would
    without this.

    Python raises `KeyboardInterrupt` wherever the program is. In a finalizer, such as that of
    a progress bar, it is printed and lost, and the work goes on.

    A context manager, for the main thread.
    """

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """
        Raises:
            KeyboardInterrupt: where there was a Ctrl-C.
        """
        if self._noted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(signal.SIGINT, self._before)
