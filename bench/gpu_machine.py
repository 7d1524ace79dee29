"""The machine that benches run on: its name and versions, and whether Triton interprets."""

from __future__ import annotations

import os
import sys

import torch
import triton
from triton import knobs


def machine() -> dict[str, str]:
    """The device and the versions that results hold for."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def choose_interpreter(wanted: bool) -> None:
    """Start anew where Triton's interpreter is not as wanted: Triton asks when it is imported."""
    if wanted != knobs.runtime.interpret:
        os.environ.pop("TRITON_INTERPRET", None)
        if wanted:
            os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
