"""`kernel_bench.py --tune`: tries other tiles for the attention kernels, and ranks them.

Beside the tile itself, the size of the cache's blocks is tried, and for decodes the shortest piece
of a context. A full run tries every combination. A quick one changes one value at a time, and goes
on from the best.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from parts.kernel_bench.attention import UniformBatch, attention_batches, attention_problem
from shared.kernel_cases import OURS, Contestant, KernelSetting, Problem, Scale
from shared.kernel_timing import checked, measure, one_call

# The functions with which the wrappers choose their tile, and the values that are tried. The rows
# of a decode's tile follow from the batch.
CHOICES = {
    "prefill": "minserve.kernels.triton_backend.prefill_tile",
    "decode": "minserve.kernels.triton.decode_plan.decode_tile",
}
LEAST_SPLIT = "minserve.kernels.triton.decode_plan.LEAST_SPLIT"
TRIED = {
    "prefill": {
        "num_stages": (2, 3, 4, 5),
        "block_n": (32, 64, 128),
        "num_warps": (4, 8),
        "block_m": (64, 128),
        "block_size": (16, 32, 64, 128),
    },
    "decode": {
        "num_stages": (2, 3, 4, 5),
        "block_n": (32, 64, 128),
        "num_warps": (4, 8),
        "least_split": (128, 256, 512),
        "block_size": (16, 32, 64, 128),
    },
}
SHOWN = 4
MOST_ROUNDS = 2
Change = dict[str, int]
Results = list[tuple[float, Change]]


def every_change(kernel: str) -> list[Change]:
    """Return every combination of `TRIED`."""
    tried = TRIED[kernel]
    return [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]


def single_changes(kernel: str) -> list[Change]:
    """Return each value of `TRIED` alone."""
    return [{name: value} for name, values in TRIED[kernel].items() for value in values]


def tuned_problem(batch: UniformBatch, change: Change, setting: KernelSetting) -> Problem:
    """Return a batch's problem, for which minserve runs as a change says."""
    problem = attention_problem(
        replace(batch, block_size=change.get("block_size", batch.block_size)), setting
    )
    return with_tile(problem, change)


def with_tile(problem: Problem, change: Change) -> Problem:
    """Return the problem with another tile for minserve; ``block_size`` has no effect here."""
    build = problem.contestants[OURS]
    tile = {k: v for k, v in change.items() if k not in ("block_size", "least_split")}

    def changed() -> Contestant:
        module, _, name = CHOICES[problem.kernel].rpartition(".")
        chosen = getattr(__import__(module, fromlist=[name]), name)

        def choose(*args: Any, **kwargs: Any) -> Any:
            return chosen(*args, **kwargs)._replace(**tile)

        with ExitStack() as stack:
            stack.enter_context(mock.patch(CHOICES[problem.kernel], choose))
            if "least_split" in change:
                stack.enter_context(mock.patch(LEAST_SPLIT, change["least_split"]))
            return build()

    return replace(problem, contestants={OURS: changed})


class TileTimer:
    """Times changes for one batch; those that do not compile, fit or give right results have none.

    Args:
        rep_ms: milliseconds for measuring each change; ``None`` for one call, in dry runs.
    """

    def __init__(self, batch: UniformBatch, setting: KernelSetting, rep_ms: float | None) -> None:
        self._batch = batch
        self._setting = setting
        self._rep_ms = rep_ms
        self._made: tuple[int, Problem, torch.Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, change: Change) -> float | None:
        """Return the milliseconds of a change."""
        problem, expected = self._problem(change.get("block_size", self._batch.block_size))
        try:
            contestant = with_tile(problem, change).contestants[OURS]()
            checked(contestant, expected, problem.dtype)
            timing = (
                one_call(contestant) if self._rep_ms is None else measure(contestant, self._rep_ms)
            )
        except Exception as error:  # most often, the tile is too large for the device
            tqdm.write(f"{problem.label} {change}: {type(error).__name__}: {error}"[:160])
            return None
        return timing.p50

    def _problem(self, block_size: int) -> tuple[Problem, torch.Tensor]:
        """Return the problem with blocks of that size, and its right result."""
        if self._made is None or self._made[0] != block_size:
            self._made = None  # its memory is free before the next is made
            problem = tuned_problem(self._batch, {"block_size": block_size}, self._setting)
            self._made = block_size, problem, problem.expected()
        return self._made[1:]


def climb(time_of: Callable[[Change], float | None], kernel: str) -> Results:
    """Time the tile as chosen, then change one value at a time, from the best on.

    Returns:
        all that was timed, the fastest first.
    """
    found: dict[tuple[tuple[str, int], ...], tuple[float, Change]] = {}
    best: Change = {}
    for _ in range(MOST_ROUNDS):
        before = best
        for change in ({}, *single_changes(kernel)):
            tried = {**best, **change}
            key = tuple(sorted(tried.items()))
            if key not in found:
                ms = time_of(tried)
                found[key] = (float("inf") if ms is None else ms, tried)
            best = min(found.values(), key=lambda one: one[0])[1]
        if best == before:
            break
    return sorted((one for one in found.values() if one[0] < float("inf")), key=lambda one: one[0])


def tune(
    batch: UniformBatch, setting: KernelSetting, scale: Scale, rep_ms: float, kernel: str
) -> Results:
    """Return the milliseconds of all changes that were timed, the fastest first."""
    time_of = TileTimer(batch, setting, None if scale is Scale.DRY else rep_ms)
    if scale is Scale.QUICK:
        return climb(time_of, kernel)
    every = every_change(kernel)
    timed = [(time_of(c), c) for c in ({}, *(every[:1] if scale is Scale.DRY else every))]
    return sorted(((ms, c) for ms, c in timed if ms is not None), key=lambda one: one[0])


def run_tune(
    setting: KernelSetting, scale: Scale, only: list[str] | None, rep_ms: float, seconds: float
) -> int:
    """Try tiles on every attention case, and print the table, then one line of JSON.

    Args:
        seconds: after so many seconds no further case is begun; each kernel has its part.
    """
    if only and not set(only) & set(CHOICES):
        print(f"nothing of {', '.join(only)} has tiles to tune", file=sys.stderr)
        return 2
    found = []
    kernels = [kernel for kernel in CHOICES if not only or kernel in only]
    for kernel in kernels:
        batches = attention_batches(kernel, scale)
        started = time.monotonic()
        if setting.device.type == "cuda":
            _precompile(kernel, batches, setting, scale)
        for batch in batches:
            if time.monotonic() - started > seconds / len(kernels):
                break
            times = tune(batch, setting, scale, rep_ms, kernel)
            case = {"kernel": kernel, **batch.case}
            default = next((ms for ms, change in times if not change), None)
            print(" ".join(map(str, case.values())), f"as chosen {default} ms", flush=True)
            for ms, change in times[:SHOWN]:
                print(f"  {ms:9.4f} ms  {change or 'as chosen'}", flush=True)
            best_ms, best = times[0] if times else (None, None)
            found.append({**case, "chosen_ms": default, "best_ms": best_ms, "best": best})
    print(json.dumps({"tuned": found, "dry": scale is Scale.DRY}))
    return 0


def _precompile(
    kernel: str, batches: list[UniformBatch], setting: KernelSetting, scale: Scale
) -> None:
    from parts.kernel_bench.compile_only import precompile_here

    changes = [{}, *(single_changes(kernel) if scale is Scale.QUICK else every_change(kernel))]
    precompile_here(
        [partial(tuned_problem, batch, change) for batch in batches for change in changes],
        setting.dtype,
    )
