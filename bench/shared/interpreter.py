"""Triton's interpreter, in which kernels run without a GPU: its choice, and its speed."""

from __future__ import annotations

import dataclasses
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
    """Run kernels in Triton's interpreter in about a quarter of its time, with the same results.

    Most of the time goes into what surrounds the arithmetic, see the functions below. Triton 3.6 to 3.9
    have the internals that this needs; others are left as they are.
    """
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    if not hasattr(interpreter, "_patch_lang") or hasattr(launch, "is_quick"):
        return
    _replace_once_in_a_launch(interpreter)
    _leave_out_unused_checks(interpreter)
    _remember_types(interpreter)


def _replace_once_in_a_launch(interpreter: Any) -> None:
    """Whenever a kernel calls a function, such as ``tl.max``, the interpreter replaces everything
    in ``triton.language`` that the function may use. For each module of functions, once in a
    launch is enough.
    """
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
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


def _leave_out_unused_checks(interpreter: Any) -> None:
    """Each sum and product of integers is done again in 64 bits, to see whether it overflows; but
    the verdict is looked at in debugging only.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_types(interpreter: Any) -> None:
    """Every value makes its type and its shape anew, constant by constant, and looks its NumPy
    type up in a table that is built for the purpose. They never change, so one of each is enough.
    """
    from triton.language import core

    find_numpy_type = interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}

    def numpy_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = find_numpy_type(dtype.scalar)
        return numpy_types[name]

    make_block_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    block_types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        space = getattr(element_ty, "address_space", None)  # of pointers, which are unhashable
        key = (element_ty.name, space, *[getattr(size, "value", size) for size in sizes])
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = dict(self.__dict__)
        else:
            self.__dict__.update(block_types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[key]

    interpreter._get_np_dtype = numpy_type
    core.block_type.__init__ = init_block_type
    core.tensor.__init__ = init_tensor
