"""Tokens per second over HTTP: streams at once from a server with a small model of random weights.

The server is a process of its own, as it is served. The last line is JSON.

    python bench/parts/gpu/http_load.py [--dry]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import torch

from minserve.workload.server_process import ServerProcess, minserve_command
from shared.synthetic_models import SHAPES, write_shape, write_words


class HttpEffort(NamedTuple):
    """The model's shape, streams at once, tokens of each prompt and output, and the flags."""

    shape: str
    streams: int
    prompt_tokens: int
    output_tokens: int
    flags: tuple[str, ...]


FULL = HttpEffort(
    "smollm2-135m", 128, 128, 256,
    ("--device", "cuda", "--max-num-seqs", "128", "--max-model-len", "1024", "--profile-seconds", "2"),
)  # fmt: skip
DRY = HttpEffort(
    "tiny-llama", 2, 4, 3,
    ("--device", "cpu", "--dtype", "float32", "--num-blocks", "32", "--max-num-seqs", "2",
     "--max-model-len", "64", "--profile-seconds", "0.5"),
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


async def stream(session: aiohttp.ClientSession, url: str, effort: HttpEffort) -> list[float]:
    """Return the times of one stream's events, the first its start."""
    body = {
        "prompt": [1] * effort.prompt_tokens,
        "max_tokens": effort.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    times = [time.perf_counter()]
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                times.append(time.perf_counter())
    return times


async def load(url: str, effort: HttpEffort) -> dict[str, Any]:
    """Return the rate of all streams together, and how long their first tokens took."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await stream(session, url, effort)
        started = time.perf_counter()
        times = await asyncio.gather(*(stream(session, url, effort) for _ in range(effort.streams)))
    seconds = max(own[-1] for own in times) - started
    gaps = [1e3 * (own[-1] - own[1]) / max(1, effort.output_tokens - 1) for own in times]
    return {
        "streams": effort.streams,
        "tokens_s": round(effort.streams * effort.output_tokens / seconds),
        "ttft_ms": round(1e3 * statistics.median(own[1] - own[0] for own in times), 2),
        "tpot_ms": round(statistics.median(gaps), 3),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    args = parser.parse_args()
    effort = DRY if args.dry else FULL
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), effort.shape)
        with ServerProcess(minserve_command("--model", str(path), *effort.flags)) as server:
            told = asyncio.run(load(server.url, effort))
    print(json.dumps({**told, "model": effort.shape, "dry": args.dry}))


if __name__ == "__main__":
    main()
