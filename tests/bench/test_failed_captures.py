"""A contestant that no CUDA graph takes: the sweep goes on in a new process, which launches it."""

from __future__ import annotations

import os
import sys
from typing import Any

import kernel_bench
import pytest
import torch

from parts.kernel_bench import sweep as sweeping
from parts.kernel_bench.sweep import NotCapturedError, problems, sweep
from shared.kernel_cases import KernelSetting, Scale
from shared.kernel_timing import CaptureFailedError, Ceilings, KernelTiming

PLACE = KernelSetting(torch.device("cpu"), torch.float32, cache_bytes=0)
CEILINGS = Ceilings(1.0, 1.0)


def refuse(_: object, rep_ms: float, *, captured: bool) -> KernelTiming:
    """No graph takes anybody."""
    if captured:
        raise CaptureFailedError("operation not permitted")
    return KernelTiming(rep_ms, rep_ms, rep_ms, in_graph=False)


def test_the_sweep_ends_at_a_capture_that_fails_and_then_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweeping, "measure", refuse)
    cases = problems(["bias_relu"], Scale.DRY)[:1]
    names = list(cases[0][1](PLACE).contestants)
    launched: list[str] = []
    for name in names:
        with pytest.raises(NotCapturedError) as caught:
            list(sweep(cases, PLACE, CEILINGS, 1.0, launched))
        assert caught.value.name == name
        launched.append(name)
    (row,) = sweep(cases, PLACE, CEILINGS, 1.0, launched)
    assert row["launched"] == names
    assert not row["failed"]


def test_the_new_process_begins_where_the_old_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *words: called.append(words))
    words = ["bench/kernel_bench.py", "--only", "decode", "--seconds", "9", "--launch=cudnn"]
    monkeypatch.setattr(sys, "argv", [*words, "--begin=2", "--began=5.0"])
    args = kernel_bench.parse()
    assert (args.begin, args.began, args.launch) == (2, 5.0, ["cudnn"])
    kernel_bench.go_on(args, 4, "flash-attn")
    ((program, command),) = called
    assert program == sys.executable
    monkeypatch.setattr(sys, "argv", command[1:])
    again = kernel_bench.parse()
    assert (again.begin, again.began, again.seconds) == (4, 5.0, 9.0)
    assert again.launch == ["cudnn", "flash-attn"]
