"""Which device an engine runs on, and with how many threads."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path

import torch

from minserve.config import EngineConfig
from minserve.engine.device.thread_count import ThreadCount
from minserve.errors import ConfigError
from minserve.machine import Machine

log = logging.getLogger(__name__)

# The first exists where a GPU can be used, and the second tells its driver's version.
NVIDIA_DEVICE, NVIDIA_DRIVER = Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version")


def choose_device(name: str) -> torch.device:
    """Return the device of a setting; ``auto`` takes a GPU where torch can use one.

    A GPU that torch cannot use is named in one line of the log.

    Raises:
        ConfigError: where a GPU is asked for and there is none that torch can use.
    """
    if name == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says the same in several lines
        if torch.cuda.is_available():
            return torch.device("cuda")
    problem = _why_no_gpu()
    if name == "cuda":
        raise ConfigError(
            f"device cuda was asked for, but {problem or 'torch sees no CUDA device'}; "
            "or use --device cpu"
        )
    if problem is not None:
        log.warning("%s; running on the CPU", problem)
    return torch.device("cpu")


def _why_no_gpu() -> str | None:
    """Return why torch cannot use the NVIDIA GPU of this machine.

    ``None`` stands for a machine without one, or one that is hidden on purpose.
    """
    if not NVIDIA_DEVICE.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        found = re.search(r"Kernel Module.*?\s(\d[\d.]+)", NVIDIA_DRIVER.read_text())
    except OSError:
        found = None
    driver = f"the NVIDIA driver {found[1]}" if found else "the NVIDIA driver"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA in it; install one built for CUDA"
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use {driver}; "
        "update the driver, or install a torch built for an older CUDA"
    )


def set_num_threads(config: EngineConfig, device: torch.device) -> ThreadCount | None:
    """Give torch's operations on the CPU as many threads as this process may keep busy.

    Returns:
        On a CPU, what adapts that number before each pass.
    """
    machine = Machine.look()
    if device.type != "cpu":
        # Little runs on the CPU then, but torch does not know of quotas.
        if machine.cpu_quota is not None:
            torch.set_num_threads(min(torch.get_num_threads(), machine.num_threads))
        return None
    num_ranks = config.tensor_parallel
    threads = config.threads or max(1, machine.num_threads // num_ranks)
    settings = [] if config.threads is None else [f"--threads {threads}"]
    if num_ranks > 1:
        settings.append(f"--tensor-parallel {num_ranks}")
    if settings:
        machine.warn_of(threads * num_ranks, " ".join(settings))
    torch.set_num_threads(threads)
    # How work is divided among threads may show in the last bits.
    adapts = not config.deterministic
    return ThreadCount(torch.get_num_threads(), machine.cores, adapts=adapts)
