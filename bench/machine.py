"""`machine`: what a benchmark's figures were measured on."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from minserve.cpu_name import CPUINFO, cpu_name

# What a processor needs to multiply low precision fast, by the names in /proc/cpuinfo.
INSTRUCTIONS = ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def machine() -> dict[str, Any]:
    """The processor, its cores and what it multiplies in hardware, and the version of torch."""
    return {
        "cpu": cpu_name(),
        "instructions": instructions(_cpuinfo()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "torch": torch.__version__,
    }


def instructions(cpuinfo: str) -> list[str]:
    """Those of `INSTRUCTIONS` that the first processor of a /proc/cpuinfo has."""
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
