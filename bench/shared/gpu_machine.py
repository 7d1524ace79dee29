"""The machine that benches run on: name and versions, and the choice of Triton's interpreter."""

from __future__ import annotations

import os
import sys

import torch
import triton
from triton import knobs


def machine() -> dict[str, str]:
    """Return the device and the versions for which results hold."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def choose_interpreter(wanted: bool) -> None:
    """Start this program anew if Triton's interpreter, set at import, is not as wanted."""
    if wanted != knobs.runtime.interpret:
        os.environ.pop("TRITON_INTERPRET", None)
        if wanted:
            os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
