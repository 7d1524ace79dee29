"""What the kernels' wrappers launch, compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import kernel_bench
import pytest
import torch

from parts.kernel_bench.compile_only import precompile_here
from parts.kernel_bench.prefill_tiles import tiles_problem
from parts.kernel_bench.triton_aot import FEW_SPILL_BYTES, KIB, Built, compiling_for
from shared.kernel_cases import Scale

ROOT = Path(__file__).parents[2]
KERNELS = {
    "decode",
    "prefill",
    "rms_norm",
    "layer_norm",
    "qk_norm",
    "silu_mul",
    "gelu_tanh_mul",
    "write_kv",
    "truncation",
    "packed_linear",
}

# A tile whose stages no GPU's shared memory holds.
TOO_LARGE = """
import torch
from unittest import mock
from parts.kernel_bench.compile_only import cases, compile_case
from minserve.kernels.triton.chunked_prefill import PrefillTile

case = next(case for case in cases(quick=True) if case.kernel == "prefill")
tile = PrefillTile(64, 128, num_warps=4, num_stages=16)
with mock.patch("minserve.kernels.triton_backend.prefill_tile", return_value=tile):
    print("; ".join(compile_case(case, 90).failures))
"""


def run(*args: str) -> subprocess.CompletedProcess:
    """A Python process in which Triton compiles, as it would on a GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "bench")
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_every_kernel_compiles_for_both_architectures_without_spills_to_speak_of():
    done = run("bench/kernel_bench.py", "--compile-only", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failures"] == []
    # Decodes over int8 with heads of 128 dimensions, which an H100 runs faster so than without.
    assert told["spills"] <= FEW_SPILL_BYTES
    assert told["unpipelined"] == told["miscompiled"] == 0
    assert told["archs"] == [80, 90]
    assert 0 < told["max_shared"] <= 227 * KIB
    compiled = {line.split()[0] for line in done.stdout.splitlines()[:-1]}
    assert compiled >= KERNELS


def test_where_time_is_short_only_the_quick_sweep_is_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch,
):
    def ahead(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["kernel_bench.py", *flags])
        return len(kernel_bench.compiled_ahead(kernel_bench.parse(), Scale.FULL))

    monkeypatch.setattr(sys, "argv", ["kernel_bench.py", "--quick"])
    quick = len(kernel_bench.compiled_ahead(kernel_bench.parse(), Scale.QUICK))
    assert ahead("--seconds", "55") == quick < ahead()


def test_what_cannot_be_compiled_ahead_is_told():
    makes = [partial(tiles_problem, 64, 4), partial(tiles_problem, 64, 0)]
    (failure,) = precompile_here(makes, torch.bfloat16)
    assert failure.startswith("ZeroDivisionError")


def test_a_tile_beyond_the_shared_memory_is_a_failure():
    done = run("-c", TOO_LARGE)
    assert "KiB of shared memory, where a block may use 227" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"spill_bytes": 24}, "24 bytes of registers spilled"),
        ({"shared": 164 * KIB}, "164 KiB of shared memory, where a block may use 163"),
        ({"instructions": ""}, "tl.dot without instructions of the tensor cores"),
        ({"num_stages": 3, "ahead": 0}, "3 stages, but a loop waits for all loads there are"),
        ({"num_stages": 3, "ahead": None}, "3 stages, but a loop waits for all loads there are"),
        ({"mistakes": ("nothing has written UR9",)}, "nothing has written UR9"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_said(changed: dict, problem: str):
    good = {
        "name": "kernel", "digest": "0", "arch": 80, "num_warps": 4, "num_stages": 2,
        "registers": 64, "spill_bytes": 0, "shared": 0, "has_dot": True,
        "needs_tensor_cores": True, "instructions": "mma",
        "ahead": 0, "buffers": 1,
    }  # fmt: skip
    assert Built(**good).problems() == []
    assert Built(**{**good, **changed}).problems() == [problem]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not on")
def test_the_interpreter_is_no_compiler():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compiling_for(90):
        pass
