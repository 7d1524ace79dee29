"""The limits of a CPU: its rates of memory and matmuls, and the time of a model's linears alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from minserve.models.layers import Linear

# 256 MiB of float32: more than any cache holds.
LARGE = 64 * 2**20


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median wall time of ``run`` in milliseconds, after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def memory_rates() -> dict[str, float]:
    """Return bytes per nanosecond: of a copy (read + written), and of reading alone."""
    source = torch.ones(LARGE)
    target = torch.empty_like(source)
    return {
        "copy_gb_s": 2 * source.nbytes / milliseconds(lambda: target.copy_(source), 7) / 1e6,
        "read_gb_s": source.nbytes / milliseconds(source.sum, 7) / 1e6,
    }


def ceilings() -> dict[str, float]:
    """Return `memory_rates`, and the GFLOP/s of square matmuls."""
    out = memory_rates()
    for dtype in (torch.float32, torch.bfloat16):
        size = 2048 if dtype is torch.float32 or fast_bf16() else 256
        a = torch.ones(size, size, dtype=dtype)
        name = f"matmul_{str(dtype).removeprefix('torch.')}_gflop_s"
        out[name] = 2 * size**3 / milliseconds(partial(torch.matmul, a, a), 5) / 1e6
    return {name: round(value, 1) for name, value in out.items()}


def fast_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.inference_mode()
def pass_milliseconds(calls: Sequence[tuple[Linear, Tensor]], repeats: int) -> float:
    """Return the median milliseconds of one pass over all linears.

    The linears run one after another, so that no weight stays in a cache from one pass to the next.

    Args:
        calls: linears with their ``[rows, in]`` inputs.
    """

    def run() -> None:
        for linear, x in calls:
            linear(x)

    return milliseconds(run, repeats)
