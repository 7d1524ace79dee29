"""Triton's interpreter, in which kernels run without a GPU: its choice, and its speed."""

from __future__ import annotations

import os
import sys
from typing import Any


def choose_interpreter(wanted: bool) -> None:
    """Start this program anew if Triton's interpreter, set at import, is not as wanted."""
    from triton import knobs  # late, so that --help works where Triton is missing

    if wanted != knobs.runtime.interpret:
        os.environ.pop("TRITON_INTERPRET", None)
        if wanted:
            os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if wanted:
        quicken_interpreter()


def quicken_interpreter() -> None:
    """Halve the time of kernels in Triton's interpreter.

    Whenever a kernel calls a function, such as ``tl.max``, the interpreter replaces everything in
    ``triton.language`` that the function may use. For each module of functions, once in a launch is
    enough. Triton 3.6 to 3.9 have the internals that this needs; others are left as they are.
    """
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    if not hasattr(interpreter, "_patch_lang") or hasattr(launch, "is_quick"):
        return
    replace = interpreter._patch_lang
    replaced_for: set[int] = set()

    def replace_once(function: Any) -> Any:
        if id(function.__globals__) in replaced_for:
            return None  # only a launch, whose call comes first, asks for what has been replaced
        replaced_for.add(id(function.__globals__))
        return replace(function)

    def launch_quickly(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced_for.clear()
        return launch(self, *args, **kwargs)

    launch_quickly.is_quick = True  # type: ignore[attr-defined]  # a mark of this function's own
    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_quickly
