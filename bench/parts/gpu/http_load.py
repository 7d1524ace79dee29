"""Tokens per second over HTTP: streams at once from a server with a small model of random weights.

The server is a process of its own, as it is served, and so is the client, which reads raw bytes. Beside
what the client saw stand the engine's own iterations and the processor time of each part, so that the
figures tell where the time goes. The last line is JSON.

    python bench/parts/gpu/http_load.py [--dry]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minserve.workload.server_process import ServerProcess, minserve_command
from shared.http_streams.turn import StreamLoad, StreamTurn, turn
from shared.synthetic_models import SHAPES, write_shape, write_words

TOKENS = "generation_tokens_total"
SETTLED_S = 10.0


class HttpEffort(NamedTuple):
    """The model's shape, the streams, the tokens of each in the turn that warms up, and the flags."""

    shape: str
    load: StreamLoad
    warm_tokens: int
    flags: tuple[str, ...]


FULL = HttpEffort(
    "smollm2-135m", StreamLoad(128, 512, 128), 256,
    ("--device", "cuda", "--max-num-seqs", "128", "--max-model-len", "1024", "--profile-seconds", "2"),
)  # fmt: skip
# Of several short streams one may end before another has begun, on a busy machine.
DRY = HttpEffort(
    "tiny-llama", StreamLoad(1, 40, 4), 40,
    ("--device", "cpu", "--dtype", "float32", "--num-blocks", "32", "--max-num-seqs", "2",
     "--max-model-len", "64", "--profile-seconds", "0.5", "--engine-process", "own",
     "--attention-backend", "torch"),
)  # fmt: skip


def write_model(folder: Path, shape: str) -> Path:
    """Write a model of a shape with random weights, and a tokenizer that has a word for each id."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = write_shape(folder / shape, shape, tokenizer=False)
    values = dict(SHAPES[shape])
    write_words(path, values["vocab_size"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


def sums(url: str) -> Counter[str]:
    """Return the counters of a server, and its histograms' sums and counts, summed over labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{url}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    found: Counter[str] = Counter()
    for family in families:
        for sample in family.samples:
            if sample.name.endswith(("_total", "_sum", "_count")):
                found[sample.name.removeprefix("minserve:")] += sample.value
    return found


def settled(url: str, before: Counter[str], num_tokens: int) -> Counter[str]:
    """Return by how much `sums` grew, once so many tokens are among them.

    An engine in a process of its own tells its counts some times a second.
    """
    limit = time.monotonic() + SETTLED_S
    while (found := sums(url))[TOKENS] - before[TOKENS] < num_tokens and time.monotonic() < limit:
        time.sleep(0.05)
    found.subtract(before)
    return found


def figures(found: StreamTurn, engine: Counter[str], load: StreamLoad) -> dict[str, Any]:
    """Return what came, and where the time went.

    The engine's own iterations tell whether tokens are late because of the device, or because of
    what brings them to the client: compare ``iteration_ms`` with ``tpot_ms``. ``cores`` are those
    that each part kept busy; each has one thread that does its work, so that one near 1 is what the
    others wait for.
    """
    counts = found.counts
    return {
        "streams": load.streams,
        "tokens_s": round(found.tokens_per_s),
        "ttft_ms": round(1e3 * statistics.median(counts.first_s), 2),
        "tpot_ms": round(1e3 * statistics.median(counts.token_s), 3),
        "seconds": round(counts.seconds, 3),
        "engine": {
            "iterations": round(engine["iteration_seconds_count"]),
            "iteration_ms": _mean_ms(engine, "iteration_seconds"),
            "planning_ms": _mean_ms(engine, "planning_seconds"),
            "tokens_s": round(engine[TOKENS] / max(1e-9, engine["iteration_seconds_sum"])),
        },
        "cores": {part: round(s / counts.seconds, 3) for part, s in found.cpu_s.items()},
        "cpu_us_per_token": {part: round(us, 2) for part, us in found.cpu_us().items()},
        "events_per_read": round(counts.events / max(1, counts.reads), 2),
    }


def _mean_ms(engine: Counter[str], name: str) -> float:
    return round(1e3 * engine[f"{name}_sum"] / max(1.0, engine[f"{name}_count"]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    args = parser.parse_args()
    effort = DRY if args.dry else FULL
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), effort.shape)
        with ServerProcess(minserve_command("--model", str(path), *effort.flags)) as server:
            name = path.name
            load, warm = effort.load, effort.load._replace(tokens=effort.warm_tokens)
            num_warm, num_tokens = (one.streams * one.tokens for one in (warm, load))
            turn(server, name, warm)
            settled(server.url, Counter(), num_warm)
            before = sums(server.url)
            found = turn(server, name, load)
            told = figures(found, settled(server.url, before, num_tokens), load)
    print(json.dumps({**told, "model": effort.shape, "dry": args.dry}))


if __name__ == "__main__":
    main()
