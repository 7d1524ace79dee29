"""The choice of Triton's interpreter, in which kernels run without a GPU."""

from __future__ import annotations

import os
import sys


def choose_interpreter(wanted: bool) -> None:
    """Start this program anew if Triton's interpreter, set at import, is not as wanted."""
    from triton import knobs  # late, so that --help works where Triton is missing

    if wanted != knobs.runtime.interpret:
        os.environ.pop("TRITON_INTERPRET", None)
        if wanted:
            os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
