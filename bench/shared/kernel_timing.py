"""Timing and checking on a GPU: its ceilings, medians over rotated inputs, errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.kernel_cases import Contestant

QUANTILES = [0.2, 0.5, 0.8]
COPY_BYTES = 2**30
MATMUL_SIZE = 8192
# Largest ``|out - expected| / |expected|``. Right results lie well below (bfloat16 near 3e-3).
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}


class Ceilings(NamedTuple):
    """The limits of the machine.

    Attributes:
        copy_gb_s: GB/s of copies on the device, bytes read and written.
        matmul_tflop_s: TFLOP/s of bfloat16 matmuls with random operands.
    """

    copy_gb_s: float
    matmul_tflop_s: float


class CaptureFailedError(RuntimeError):
    """A run could not be captured in a CUDA graph. Nothing after it in this process is certain:
    the generator of random numbers, and libraries, may go on as if they were still captured.
    """


class KernelTiming(NamedTuple):
    """The milliseconds of one run.

    Attributes:
        in_graph: true if it was replayed from a CUDA graph, so that launches cost nothing.
    """

    p20: float
    p50: float
    p80: float
    in_graph: bool


def measure_ceilings(rep_ms: float) -> Ceilings:
    """Measure the limits of the current CUDA device."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = _bench(lambda: target.copy_(source), rep_ms)[1]
    a, b = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda") for _ in "ab"
    )
    matmul = _bench(lambda: a @ b, rep_ms)[1]
    return Ceilings(2 * COPY_BYTES / copy / 1e6, 2 * MATMUL_SIZE**3 / matmul / 1e9)


def measure(contestant: Contestant, rep_ms: float, *, captured: bool = True) -> KernelTiming:
    """Return quantiles of a run's time, with all sets of inputs in turn.

    The round is captured in a CUDA graph, or launched each time.

    Args:
        rep_ms: milliseconds for measuring.
        captured: whether it is captured.

    Raises:
        CaptureFailedError: where it cannot be.
    """
    runs = contestant.runs
    graph = _capture(runs) if captured else None
    times = _bench(graph.replay if graph else lambda: _round(runs), rep_ms)
    p20, p50, p80 = (ms / len(runs) for ms in times)
    return KernelTiming(p20, p50, p80, in_graph=graph is not None)


def one_call(contestant: Contestant) -> KernelTiming:
    """Return the wall time of one call, for dry runs, where the time means nothing."""
    started = time.perf_counter()
    contestant.runs[0]()
    ms = (time.perf_counter() - started) * 1e3
    return KernelTiming(ms, ms, ms, in_graph=False)


def checked(contestant: Contestant, expected: Tensor, dtype: torch.dtype) -> float:
    """Return ``|out - expected| / |expected|`` of the first set.

    Memory that the output will likely use is filled with NaN before, so that elements that are
    never written show.

    Raises:
        RuntimeError: if the error exceeds `TOLERANCE`.
    """
    expected = expected.flatten()
    torch.full_like(expected, torch.nan, dtype=dtype)
    out = contestant.result().float().flatten()
    error = float((out - expected).norm() / expected.norm())
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"wrong: relative error {error:.2g}, allowed {TOLERANCE[dtype]:g}")
    return error


def _bench(run: Callable[[], Any], rep_ms: float) -> list[float]:
    from triton.testing import do_bench

    return do_bench(run, warmup=rep_ms / 4, rep=rep_ms, quantiles=QUANTILES)


def _round(runs: list[Callable[[], Any]]) -> None:
    for run in runs:
        run()


def _capture(runs: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Capture all runs, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _round(runs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _round(runs)
    except RuntimeError as error:
        raise CaptureFailedError(str(error)) from error
    return graph
