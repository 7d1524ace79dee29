"""Compiles the kernels that a wrapper launches, for GPUs that need not be present.

The wrappers run unchanged, on CPU tensors; only the launch itself is replaced. So the
specializations, constants, warps and stages are the real ones, and cannot differ from what is
compiled here. Only this file uses Triton's internals; it holds for Triton 3.6 to 3.9.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from parts.kernel_bench import machine_code

KIB = 1024
# Shared memory that one block may use, and multiprocessors of an A100 and an H100 (CUDA C++
# Programming Guide, "Compute capabilities"; the chips' datasheets).
MAX_SHARED = {80: 163 * KIB, 90: 227 * KIB}
MULTIPROCESSORS = {80: 108, 90: 132}
ARCHS = tuple(MAX_SHARED)
# Of a multiprocessor, from the same guide: threads, registers, shared memory.
MOST_THREADS, REGISTERS, SHARED = 2048, 65536, {80: 164 * KIB, 90: 228 * KIB}
# Patterns in TTGIR: loops, and how many younger copies to shared memory may still be under way.
LOOP = re.compile(r"scf\.for .*?scf\.yield", re.DOTALL)
WAIT = re.compile(r"ttg\.async_wait .*?num = (\d+)")
# Buffers of a pipelined load: the first of three sizes of its shared memory.
BUFFERS = re.compile(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x")
# Bytes per thread. ptxas spills so few if this lets one more program run at a time.
FEW_SPILL_BYTES = 16
# In TTIR: a product of matrices that are not in float32.
SHORT_DOT = re.compile(r"tt\.dot .*: tensor<\d+x\d+x(?!f32)\w+> \*")
TENSOR_CORE = re.compile(r"wgmma\.mma_async|mma\.sync")


@dataclass(frozen=True, slots=True)
class Built:
    """A kernel as compiled for an architecture.

    Attributes:
        digest: Triton's hash of source, specialization, options and target.
        registers: registers per thread.
        spill_bytes: bytes per thread of local memory for spilled registers.
        shared: bytes of shared memory per block.
        has_dot: true if the kernel multiplies matrices.
        needs_tensor_cores: true if these are in a dtype that tensor cores multiply.
        instructions: instructions of the tensor cores that it uses: ``wgmma``, ``mma``, or none.
        ahead: number of later loads that are under way when a loop waits for a load; the least
            of all loops, ``None`` if none of them waits.
        buffers: number of tiles for which pipelined loads have room; ``None`` without such loads.
        mistakes: the assembler's, from `machine_code.problems`.
    """

    name: str
    digest: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared: int
    has_dot: bool
    needs_tensor_cores: bool
    instructions: str
    ahead: int | None
    buffers: int | None
    mistakes: tuple[str, ...] = ()

    @property
    def at_a_time(self) -> int:
        """The number of programs that a multiprocessor runs at a time."""
        threads = 32 * self.num_warps
        registers = -(-self.registers // 8) * 8 * threads
        return min(
            MOST_THREADS // threads,
            REGISTERS // max(1, registers),
            SHARED[self.arch] // (self.shared + KIB),
        )

    @property
    def is_unpipelined(self) -> bool:
        """True if a loop with products waits for all its loads, though there are stages for more.

        A tile of two stages has one buffer by choice: other programs load while this one computes.
        """
        return self.has_dot and self.num_stages > 2 and not self.ahead

    def problems(self) -> list[str]:
        """Return what keeps it from running well, or at all, on its architecture."""
        found = list(self.mistakes)
        if self.spill_bytes > FEW_SPILL_BYTES:
            found.append(f"{self.spill_bytes} bytes of registers spilled")
        if self.shared > MAX_SHARED[self.arch]:
            found.append(
                f"{self.shared / KIB:.0f} KiB of shared memory, where a block may use "
                f"{MAX_SHARED[self.arch] // KIB}"
            )
        if self.needs_tensor_cores and not self.instructions:
            found.append("tl.dot without instructions of the tensor cores")
        if self.is_unpipelined:
            found.append(f"{self.num_stages} stages, but a loop waits for all loads there are")
        return found


class _CompileDriver:
    """The active driver, as far as compiling needs one. Devices are named by their architecture."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(arch: int) -> Iterator[list[CompiledKernel]]:
    """Let launches compile for ``arch`` (compute capability, times ten) and run nothing.

    Yields:
        kernels compiled by the launches so far; a kernel launched twice is there twice.

    Raises:
        RuntimeError: if Triton's interpreter is on, which compiles nothing.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels were defined for the interpreter")
    launched: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> CompiledKernel:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        launched.append(kernel)
        return kernel

    before = driver._active
    driver.set_active(_CompileDriver(arch))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield launched
    finally:
        driver._active = before


def inspect(kernel: CompiledKernel) -> Built:
    """Return the resources and instructions of a compiled kernel."""
    metadata = kernel.metadata
    found = set(TENSOR_CORE.findall(kernel.asm["ptx"]))
    registers, stack = _resources(kernel.asm["cubin"])
    return Built(
        name=metadata.name,
        digest=kernel.hash,
        arch=metadata.target.arch,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        # Triton's kernels have no local arrays, so everything on the stack was spilled.
        spill_bytes=stack,
        shared=metadata.shared,
        has_dot="tt.dot" in kernel.asm["ttir"],
        needs_tensor_cores=SHORT_DOT.search(kernel.asm["ttir"]) is not None,
        instructions="wgmma" if any("wgmma" in one for one in found) else "mma" if found else "",
        ahead=min(
            (int(n) for loop in LOOP.findall(kernel.asm["ttgir"]) for n in WAIT.findall(loop)),
            default=None,
        ),
        buffers=max((int(n) for n in BUFFERS.findall(kernel.asm["ttgir"])), default=None),
        mistakes=tuple(
            machine_code.problems(_read(kernel.asm["cubin"], knobs.nvidia.nvdisasm, "-c"))
        ),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers, and the bytes of stack, per thread."""
    text = _read(cubin, knobs.nvidia.cuobjdump, "--dump-resource-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of resources: {text!r:.200}")
    return int(usage[1]), int(usage[2])


def _read(cubin: bytes, tool: knobs.NvidiaTool, flag: str) -> str:
    """Return what one of CUDA's tools says of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [tool.path, flag, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
