"""The machine on which a benchmark's figures were measured, as JSON values."""

from __future__ import annotations

import subprocess
from typing import Any

import psutil
import torch

from minserve.cpu_name import CPUINFO, cpu_name

# Instruction sets that multiply low precision fast, by their names in /proc/cpuinfo.
INSTRUCTIONS = ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


# What nvidia-smi is asked for.
GPU_STATE = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "memory.used",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Describe the CPU: return the processor, its cores, its fast instruction sets, and the version of torch."""
    return {
        "cpu": cpu_name(),
        "instructions": instructions(_cpuinfo()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "torch": torch.__version__,
    }


def gpu_machine() -> dict[str, str]:
    """Describe the GPU: return its name, ``cpu`` if there is none, and the versions used."""
    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def gpu_state() -> dict[str, str]:
    """Return driver, clocks, power and temperature of the first GPU; nothing without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().partition("\n")[0].split(",")
    return dict(zip(GPU_STATE, map(str.strip, values), strict=False))


def instructions(cpuinfo: str) -> list[str]:
    """Return the `INSTRUCTIONS` that the first processor of a /proc/cpuinfo has."""
    for line in cpuinfo.splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "flags":
            flags = set(values.split())
            return [one for one in INSTRUCTIONS if one in flags]
    return []


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text()
    except OSError:
        return ""
