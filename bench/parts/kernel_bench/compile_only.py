"""`kernel_bench.py --compile-only`: compiles what the wrappers launch, for GPUs that are absent.

The problems are those of the sweep, with more shapes of heads. Their contestant ``minserve`` runs
as it is, except for the launches (`triton_aot.py`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import triton
from tqdm import tqdm
from triton.compiler import CompiledKernel

from minserve.machine import Machine
from minserve.progress_bar import progress_bar
from minserve.tables import text_table
from parts.kernel_bench.attention import BLOCK_SIZE, UniformBatch, attention_problem
from parts.kernel_bench.packed import FORMS as PACKED_FORMS
from parts.kernel_bench.packed import KERNEL as PACKED_KERNEL
from parts.kernel_bench.packed import packed_problem
from parts.kernel_bench.prefill_tiles import KERNEL as TILES_KERNEL
from parts.kernel_bench.prefill_tiles import tiles_problem
from parts.kernel_bench.rows import gate_problem, kv_problem, norm_problem, qk_norm_problem
from parts.kernel_bench.triton_aot import ARCHS, KIB, MULTIPROCESSORS, Built, compiling_for, inspect
from parts.kernel_bench.truncation import KERNEL as TRUNCATION_KERNEL
from parts.kernel_bench.truncation import truncation_problem
from shared.kernel_cases import OURS, Heads, KernelSetting, Make
from shared.synthetic_models import SHAPES

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 4, 8)  # query heads per KV head
NUM_KV_HEADS = 8
# Groups that models have beside these, with the few KV heads of a rank of a sharded model.
OTHER_GROUPS, SHARDED_HEAD_DIMS, SHARDED_KV_HEADS = (2, 5, 7, 10), (64, 128), 1
# Block sizes change the arithmetic of addresses, in the same way for all groups.
OTHER_BLOCK_SIZES, OTHERS_GROUP = (16, 128), 4
# Query tokens and context of a decode: one split, several, and with four drafted tokens.
DECODES = ((1, 48), (1, 4096), (5, 4096))
CHUNKS = (64, 512, 8192)
PAST = 4096
TOKENS = 64
# What is compiled of groups and of float32, for which other shapes change nothing more.
FEW_DECODES, FEW_CHUNKS = ((1, 4096), (5, 4096)), (512,)
# Forms of a KV cache in 8 bits. sm_80 has no conversions of e4m3, and the engine refuses it there.
EIGHT_BITS, CONVERTS_FP8 = ("int8", "fp8"), 89
# For fp16 the same code has another type name than for bfloat16: a part of the cases is enough.
FP16_HEAD_DIMS = (64, 128)
NORM_MODELS = ("opt-125m", "opt-6.7b", "opt-30b", "llama-3.1-8b", "llama-3.1-70b")
# One row, a tile that is not full and a full one, and so many that weights are unpacked.
PACKED_ROWS = (1, 8, 64, 512)
WORKERS, MOST_WORKERS = 2, 15


class CompileCase(NamedTuple):
    """A problem to compile.

    Attributes:
        kernel: the kernel's name in the table.
        label: the rest of its row.
        make: makes the problem.
        needs_wgmma: true if on sm_90 it must multiply with that architecture's instructions.
        least_arch: the first architecture that has its instructions.
    """

    kernel: str
    label: str
    dtype: torch.dtype
    make: Make
    needs_wgmma: bool = False
    least_arch: int = 0


class Compiled(NamedTuple):
    """The kernels of one case on one architecture; ``failures`` says what went wrong."""

    kernel: str
    label: str
    arch: int
    kernels: list[Built]
    failures: list[str]


def cases(quick: bool) -> Iterator[CompileCase]:
    """Yield the cases that the server launches for heads of usual sizes.

    They are in bfloat16, and a part of them in float16 too. With ``quick`` there is each kernel at
    every head dimension, with one kind of groups and blocks.
    """
    for shape in _attention_shapes(quick):
        yield from _attention_cases(*shape, DECODES, CHUNKS)
    if quick:
        for group in sorted({*GROUPS, *OTHER_GROUPS} - {OTHERS_GROUP}):
            heads = Heads(group * SHARDED_KV_HEADS, SHARDED_KV_HEADS, 128)
            yield from _attention_cases(heads, BLOCK_SIZE, torch.bfloat16, FEW_DECODES[:1], ())
    else:
        for head_dim in SHARDED_HEAD_DIMS:
            for group in sorted({*GROUPS, *OTHER_GROUPS}):
                heads = Heads(group * SHARDED_KV_HEADS, SHARDED_KV_HEADS, head_dim)
                shape = heads, BLOCK_SIZE, torch.bfloat16
                yield from _attention_cases(*shape, FEW_DECODES, FEW_CHUNKS)
        for head_dim in HEAD_DIMS:
            heads = Heads(OTHERS_GROUP * NUM_KV_HEADS, NUM_KV_HEADS, head_dim)
            shape = heads, BLOCK_SIZE, torch.float32
            yield from _attention_cases(*shape, FEW_DECODES, FEW_CHUNKS)
    yield from _cases_in_8_bits(quick)
    for head_dim in HEAD_DIMS:
        heads = Heads(4 * NUM_KV_HEADS, NUM_KV_HEADS, head_dim)
        for block_size in (BLOCK_SIZE,) if quick else (BLOCK_SIZE, *OTHER_BLOCK_SIZES):
            for rope in (False, True):
                make = partial(kv_problem, "", heads, TOKENS, block_size, rope)
                label = f"bfloat16 D{head_dim} G4 B{block_size} rope {rope}"
                yield CompileCase("write_kv", label, torch.bfloat16, make)
    for model in ("opt-6.7b", "llama-3.1-8b") if quick else NORM_MODELS:
        for residual in (False, True):
            kernel = "layer_norm" if model.startswith("opt") else "rms_norm"
            make = partial(norm_problem, model, TOKENS, residual=residual)
            yield CompileCase(kernel, f"bfloat16 {model} residual {residual}", torch.bfloat16, make)
        if "intermediate_size" in SHAPES[model]:
            for activation in ("silu", "gelu_tanh"):
                make = partial(gate_problem, model, TOKENS, activation=activation)
                kernel = f"{activation}_mul"
                yield CompileCase(kernel, f"bfloat16 {model}", torch.bfloat16, make)
            make = partial(qk_norm_problem, model, TOKENS)
            yield CompileCase("qk_norm", f"bfloat16 {model}", torch.bfloat16, make)
    tiles = partial(tiles_problem, 512, 16)
    yield CompileCase(TILES_KERNEL, "int64 512 of 16", torch.int64, tiles)
    make = partial(truncation_problem, "llama-3.1-8b", TOKENS, "wide")
    yield CompileCase(TRUNCATION_KERNEL, "float32 llama-3.1-8b", torch.float32, make)
    for form in ("fp8 channel",) if quick else PACKED_FORMS:
        for rows in PACKED_ROWS[:2] if quick else PACKED_ROWS:
            make = partial(packed_problem, "llama-3.1-8b", "down", rows, form)
            label, has_dot = f"bfloat16 {form} {rows} rows", 1 < rows <= 64
            yield CompileCase(PACKED_KERNEL, label, torch.bfloat16, make, needs_wgmma=has_dot)


def _cases_in_8_bits(quick: bool) -> Iterator[CompileCase]:
    """Yield attention over a KV cache in 8 bits, and the writing of it."""
    for form in EIGHT_BITS:
        if quick:
            # In prefills heads of 96 dimensions are two parts, with a layout for each.
            heads = Heads(OTHERS_GROUP * NUM_KV_HEADS, NUM_KV_HEADS, 96)
            yield from _attention_cases(heads, BLOCK_SIZE, torch.bfloat16, (), FEW_CHUNKS, form)
        for head_dim in (128,) if quick else HEAD_DIMS:
            heads = Heads(OTHERS_GROUP * NUM_KV_HEADS, NUM_KV_HEADS, head_dim)
            decodes, chunks = (FEW_DECODES[:1], FEW_CHUNKS) if quick else (DECODES, CHUNKS)
            shape = heads, BLOCK_SIZE, torch.bfloat16
            yield from _attention_cases(*shape, decodes, chunks, form)
            for rope in (False, True):
                make = partial(kv_problem, "", heads, TOKENS, BLOCK_SIZE, rope, kv_cache_dtype=form)
                label = f"bfloat16 D{head_dim} G4 B{BLOCK_SIZE} rope {rope} KV {form}"
                least_arch = CONVERTS_FP8 if form == "fp8" else 0
                yield CompileCase("write_kv", label, torch.bfloat16, make, least_arch=least_arch)


def _attention_cases(
    heads: Heads,
    block_size: int,
    dtype: torch.dtype,
    decodes: Sequence[tuple[int, int]],
    chunks: Sequence[int],
    form: str = "auto",
) -> Iterator[CompileCase]:
    """Yield decodes, as query tokens and context, and prefill chunks behind a context."""
    least_arch = CONVERTS_FP8 if form == "fp8" else 0
    heads_name = f"D{heads.head_dim} G{heads[0] // heads[1]} H{heads.num_kv_heads}"
    where = f"{_name(dtype)} {heads_name} B{block_size}"
    if form != "auto":
        where = f"{where} KV {form}"
    for queries, context in decodes:
        make = _attention(heads, queries, context - queries, block_size, decode=True, form=form)
        label = f"{where} {queries} of {context}"
        yield CompileCase("decode", label, dtype, make, least_arch=least_arch)
    for chunk in chunks:
        make = _attention(heads, chunk, PAST, block_size, decode=False, form=form)
        label = f"{where} {chunk} of {PAST + chunk}"
        # float32 has no tensor cores.
        needs_wgmma = dtype is not torch.float32
        yield CompileCase("prefill", label, dtype, make, needs_wgmma, least_arch)


def _attention_shapes(quick: bool) -> Iterator[tuple[Heads, int, torch.dtype]]:
    """Yield heads, block size and dtype."""
    for head_dim in HEAD_DIMS:
        for group in (OTHERS_GROUP,) if quick else GROUPS:
            heads = Heads(group * NUM_KV_HEADS, NUM_KV_HEADS, head_dim)
            yield heads, BLOCK_SIZE, torch.bfloat16
            if group == OTHERS_GROUP and not quick:
                for block_size in OTHER_BLOCK_SIZES:
                    yield heads, block_size, torch.bfloat16
                if head_dim in FP16_HEAD_DIMS:
                    yield heads, BLOCK_SIZE, torch.float16


def _attention(
    heads: Heads, queries: int, past: int, block_size: int, *, decode: bool, form: str
) -> Make:
    batch = UniformBatch(
        model="",
        heads=heads,
        seqs=4 if decode else 1,
        queries=queries,
        past=past,
        decode=decode,
        block_size=block_size,
        kv_cache_dtype=form,
    )
    return partial(attention_problem, batch)


def launched_kernels(
    make: Make, dtype: torch.dtype, arch: int, multiprocessors: int
) -> list[CompiledKernel]:
    """Compile what minserve launches for a problem, each kernel once. Nothing is run."""
    from minserve.kernels import triton_backend

    setting = KernelSetting(torch.device("cpu"), dtype, cache_bytes=0, filled=False)
    # Tiles and splits depend on the device, which is a CPU here, so its traits are replaced.
    device = triton_backend.DeviceProperties(multiprocessors, arch)
    described = mock.patch.object(triton_backend, "describe", return_value=device)
    with torch.inference_mode(), described, compiling_for(arch) as launched:
        make(setting).contestants[OURS]().runs[0]()
    return list({kernel.hash: kernel for kernel in launched}.values())


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Compile all kernels that one case launches on one architecture."""
    failures, kernels = [], []
    try:
        compiled = launched_kernels(case.make, case.dtype, arch, MULTIPROCESSORS[arch])
        kernels = [inspect(kernel) for kernel in compiled]
    except Exception as error:  # a kernel that does not compile must not hide the others
        failures.append(_first_line(error))
    else:
        if not kernels:
            failures.append("it launched no kernel")
        if case.needs_wgmma and arch >= 90 and not any(k.instructions == "wgmma" for k in kernels):
            failures.append("no wgmma on sm_90")
    failures += [f"{kernel.name}: {what}" for kernel in kernels for what in kernel.problems()]
    return Compiled(case.kernel, case.label, arch, kernels, failures)


class GpuTraits(NamedTuple):
    """What code depends on: compute capability, times ten, and the number of multiprocessors."""

    arch: int
    multiprocessors: int

    @classmethod
    def here(cls) -> GpuTraits:
        """Return those of the current CUDA device; of an H100 where there is none."""
        if not torch.cuda.is_available():
            return cls(90, MULTIPROCESSORS[90])
        gpu = torch.cuda.get_device_properties(0)
        return cls(10 * gpu.major + gpu.minor, gpu.multi_processor_count)


def precompile_here(makes: Sequence[Make], dtype: torch.dtype) -> list[str]:
    """Fill Triton's cache for the current CUDA device, on all cores.

    To compile one kernel after the other would take longer than to time them.

    Returns:
        what failed, which most likely shows again when the kernel runs.
    """
    gpu = GpuTraits.here()
    # Each worker imports torch anew.
    workers = max(1, min(MOST_WORKERS, Machine.look().num_processes - 1, len(makes)))
    failures: list[str] = []
    # Workers compile, also those of a program that runs in Triton's interpreter.
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        with _pool(workers) as pool:
            pending = [pool.submit(_precompile_one, make, dtype, gpu) for make in makes]
            for done in progress_bar(
                as_completed(pending), desc="Compiling", total=len(pending), unit="problem"
            ):
                if (error := done.exception()) is not None:
                    failures.append(_first_line(error))
    return failures


def _precompile_one(make: Make, dtype: torch.dtype, gpu: GpuTraits) -> None:
    launched_kernels(make, dtype, *gpu)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def _pool(workers: int) -> ProcessPoolExecutor:
    """Return new processes with one core each, in which Triton's driver is not chosen yet."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    )


def run_compile(only: Sequence[str] | None, *, quick: bool) -> int:
    """Compile everything, print the table and the line of JSON, and return the exit status.

    Args:
        only: names of kernels; ``None`` for all.
    """
    started = time.perf_counter()
    wanted = [case for case in cases(quick) if not only or case.kernel in only]
    if not wanted:
        print(f"nothing of {', '.join(only or ())} is compiled by Triton", file=sys.stderr)
        return 2
    tasks = [(case, arch) for case in wanted for arch in ARCHS if arch >= case.least_arch]
    results: list[Compiled] = []
    with _pool(WORKERS) as pool:
        pending = [pool.submit(compile_case, *task) for task in tasks]
        for done in progress_bar(
            as_completed(pending), total=len(tasks), unit="case", mininterval=1.0
        ):
            results.append(result := done.result())
            for failure in result.failures:
                tqdm.write(f"{result.kernel} {result.label} sm_{result.arch}: {failure}")
    results.sort(key=lambda r: (r.kernel, r.label, r.arch))
    headings = ("kernel", "case", "arch", "function", "warps", "stages", "buffers", "ahead", "regs",
                "spills", "KiB", "at a time", "instructions")  # fmt: skip
    lines = [_cells(result, kernel) for result in results for kernel in result.kernels]
    print(text_table(headings, lines, left=2))
    failures = [
        f"{r.kernel} {r.label} sm_{r.arch}: {failure}" for r in results for failure in r.failures
    ]
    for failure in failures:
        print(f"FAILED {failure}")
    built = {k.digest: k for result in results for k in result.kernels}.values()
    summary = {
        "kernels": len(built),
        "cases": len(results),
        "spills": sum(kernel.spill_bytes for kernel in built),
        "unpipelined": sum(kernel.is_unpipelined for kernel in built),
        "miscompiled": sum(bool(kernel.mistakes) for kernel in built),
        "triton": triton.__version__,
        "archs": list(ARCHS),
        "max_shared": max((kernel.shared for kernel in built), default=0),
        "max_registers": max((kernel.registers for kernel in built), default=0),
        "seconds": round(time.perf_counter() - started, 1),
        "failures": failures,
    }
    print(json.dumps(summary))
    return 1 if failures else 0


def _cells(result: Compiled, kernel: Built) -> tuple[object, ...]:
    return (
        result.kernel,
        result.label,
        result.arch,
        kernel.name,
        kernel.num_warps,
        kernel.num_stages,
        kernel.buffers,
        kernel.ahead,
        kernel.registers,
        kernel.spill_bytes,
        f"{kernel.shared / KIB:.1f}",
        kernel.at_a_time,
        kernel.instructions or None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
