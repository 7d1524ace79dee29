"""The sweep of `kernel_bench.py`: every problem is checked, then timed, beside its competitors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minserve.progress_bar import progress_bar
from parts.kernel_bench.attention import attention_problems
from parts.kernel_bench.packed import KERNEL as PACKED_KERNEL
from parts.kernel_bench.packed import packed_problems
from parts.kernel_bench.rows import KERNELS as ROW_KERNELS
from parts.kernel_bench.rows import row_problems
from parts.kernel_bench.truncation import KERNEL as TRUNCATION_KERNEL
from parts.kernel_bench.truncation import truncation_problems
from shared.kernel_cases import OURS, Contestant, KernelSetting, Make, Problem, Scale
from shared.kernel_timing import (
    CaptureFailedError,
    Ceilings,
    KernelTiming,
    checked,
    measure,
    one_call,
)

KERNELS = ("decode", "prefill", *ROW_KERNELS, TRUNCATION_KERNEL, PACKED_KERNEL)
FREE_SHARE = 0.8  # of the device's free memory: the most that a problem may take


def problems(kernels: Sequence[str], scale: Scale) -> list[tuple[str, Make]]:
    """Return kernels and problems, not yet made, with the quick sweep's first in case time is
    short.
    """
    found: dict[object, tuple[str, Make]] = {}
    for size in (Scale.QUICK, Scale.FULL) if scale is Scale.FULL else (scale,):
        for kernel in kernels:
            for make in _problems_of(kernel, size):
                found.setdefault((make.func, make.args, *make.keywords.items()), (kernel, make))
    return list(found.values())


def _problems_of(kernel: str, scale: Scale) -> Sequence[Make]:
    if kernel == TRUNCATION_KERNEL:
        return truncation_problems(scale)
    if kernel == PACKED_KERNEL:
        return packed_problems(scale)
    return (row_problems if kernel in ROW_KERNELS else attention_problems)(kernel, scale)


@torch.inference_mode()
def sweep(
    cases: Sequence[tuple[str, Make]],
    setting: KernelSetting,
    ceilings: Ceilings | None,
    rep_ms: float,
    launched: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield a row for every problem that fits into the device's memory, and ``{}`` for the others.

    Args:
        cases: from `problems`.
        ceilings: ``None`` in a dry run, whose times mean nothing.
        rep_ms: milliseconds for measuring each contestant.
        launched: contestants that cannot be captured in CUDA graphs.

    Raises:
        NotCapturedError: if another contestant cannot be: a new process has to go on.
        RuntimeError: if the device no longer works, for instance after an illegal access.
    """
    bar = progress_bar(cases, unit="case", mininterval=1.0)
    for kernel, make in bar:
        bar.set_description(kernel)
        problem = make(setting)
        if setting.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            if problem.memory > FREE_SHARE * torch.cuda.mem_get_info()[0]:
                tqdm.write(f"{kernel} {problem.label}: left out, too large for this device")
                yield {}
                continue
        yield _row(problem, ceilings, rep_ms, launched)


class NotCapturedError(RuntimeError):
    """A contestant could not be captured in a CUDA graph, and may have poisoned this process.

    Attributes:
        name: the contestant.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be captured: {reason}")
        self.name = name


def _row(
    problem: Problem, ceilings: Ceilings | None, rep_ms: float, launched: Collection[str]
) -> dict[str, Any]:
    """Return one line of results.

    By contestant, ``ms`` holds p20, p50 and p80, ``error`` the relative error, and ``failed``
    the reason why it has no time. ``launched`` lists contestants that could not run from a
    CUDA graph.
    """
    expected = problem.expected()
    row: dict[str, Any] = {
        "kernel": problem.kernel,
        **problem.case,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "bytes": problem.least_bytes,
        "flops": problem.flops,
        "ms": {},
        "error": {},
        "failed": {},
        "launched": [],
    }
    for name, build in problem.contestants.items():
        try:
            row["error"][name], timing = _solve(
                build, expected, problem.dtype, ceilings, rep_ms, captured=name not in launched
            )
        except CaptureFailedError as error:
            raise NotCapturedError(name, str(error).partition("\n")[0][:200]) from error
        except Exception as reason:  # if one kernel fails, the others are still worth timing
            row["failed"][name] = f"{type(reason).__name__}: {reason}".partition("\n")[0][:200]
            if expected.is_cuda:
                torch.cuda.synchronize()
            continue
        row["ms"][name] = [round(ms, 5) for ms in timing[:3]]
        if not timing.in_graph:
            row["launched"].append(name)
    if ceilings is None:
        row["dry"] = True
    elif OURS in row["ms"]:
        row |= _rates(problem, row["ms"][OURS][1], ceilings)
    return row


def _solve(
    build: Callable[[], Contestant],
    expected: Tensor,
    dtype: torch.dtype,
    ceilings: Ceilings | None,
    rep_ms: float,
    *,
    captured: bool,
) -> tuple[float, KernelTiming]:
    """Check a contestant, then time it. Its memory is free again afterwards.

    Returns:
        the contestant's relative error, and its time.

    Raises:
        RuntimeError: if the contestant's result is wrong.
    """
    contestant = build()
    error = checked(contestant, expected, dtype)
    if ceilings is None:
        return error, one_call(contestant)
    return error, measure(contestant, rep_ms, captured=captured)


def _rates(problem: Problem, ms: float, ceilings: Ceilings) -> dict[str, float | str]:
    """Return the rates reached; ``share`` is the machine's shortest time over the measured time."""
    memory_ms = problem.least_bytes / ceilings.copy_gb_s / 1e6
    matmul_ms = problem.flops / ceilings.matmul_tflop_s / 1e9
    return {
        "gb_s": round(problem.least_bytes / ms / 1e6, 1),
        "tflop_s": round(problem.flops / ms / 1e9, 2),
        "bound": "memory" if memory_ms > matmul_ms else "matmul",
        "share": round(max(memory_ms, matmul_ms) / ms, 4),
    }
