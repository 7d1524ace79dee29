"""`kernel_bench.py --tune`: tries other tiles for the attention kernels, and ranks them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from minserve.progress_bar import progress_bar
from parts.kernel_bench.attention import attention_problems
from shared.kernel_cases import OURS, KernelSetting, Problem, Scale
from shared.kernel_timing import checked, measure, one_call

# The functions with which the wrappers choose their tile, and the values that are tried. The rows
# of a decode's tile follow from the batch.
CHOICES = {
    "prefill": "minserve.kernels.triton_backend.prefill_tile",
    "decode": "minserve.kernels.triton.batched_decode.decode_tile",
}
TRIED = {
    "prefill": {
        "block_m": (64, 128),
        "block_n": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "decode": {"block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)},
}
SHOWN = 4
Change = dict[str, int]


def changes(kernel: str, scale: Scale) -> list[Change]:
    """Return no change, then every combination of `TRIED`."""
    tried = TRIED[kernel]
    every = [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]
    return [{}, *(every[:1] if scale is Scale.DRY else every)]


@torch.inference_mode()
def tune(problem: Problem, scale: Scale, rep_ms: float) -> Iterator[tuple[float, Change]]:
    """Yield the milliseconds of every tile that compiles, fits and gives right results."""
    module, _, name = CHOICES[problem.kernel].rpartition(".")
    chosen = getattr(__import__(module, fromlist=[name]), name)
    expected = problem.expected()
    for change in progress_bar(changes(problem.kernel, scale), desc=problem.label, leave=False):

        def choose(*args: Any, change: Change = change, **kwargs: Any) -> Any:
            return chosen(*args, **kwargs)._replace(**change)

        try:
            with mock.patch(CHOICES[problem.kernel], choose):
                contestant = problem.contestants[OURS]()
                checked(contestant, expected, problem.dtype)
                timing = one_call(contestant) if scale is Scale.DRY else measure(contestant, rep_ms)
        except Exception as error:  # most often, the tile is too large for the device
            tqdm.write(f"{problem.label} {change}: {type(error).__name__}: {error}"[:160])
            continue
        yield timing.p50, change


def run_tune(
    setting: KernelSetting, scale: Scale, only: list[str] | None, rep_ms: float, seconds: float
) -> int:
    """Try tiles on every attention case, and print the table, then one line of JSON.

    Args:
        seconds: after so many seconds no further case is begun.
    """
    if only and not set(only) & set(CHOICES):
        print(f"nothing of {', '.join(only)} has tiles to tune", file=sys.stderr)
        return 2
    found, started = [], time.monotonic()
    for kernel in CHOICES:
        if only and kernel not in only:
            continue
        for make in attention_problems(kernel, scale):
            if time.monotonic() - started > seconds:
                break
            problem = make(setting)
            times = sorted(tune(problem, scale, rep_ms), key=lambda one: one[0])
            default = next((ms for ms, change in times if not change), None)
            print(f"{kernel} {problem.label}: as chosen {default} ms", flush=True)
            for ms, change in times[:SHOWN]:
                print(f"  {ms:9.4f} ms  {change or 'as chosen'}", flush=True)
            best_ms, best = times[0] if times else (None, None)
            case = {"kernel": kernel, **problem.case}
            found.append({**case, "chosen_ms": default, "best_ms": best_ms, "best": best})
    print(json.dumps({"tuned": found, "dry": scale is Scale.DRY}))
    return 0
