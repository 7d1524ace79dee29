"""Measures what ``--deterministic`` costs: passes with and without it, in alternating turns.

A pass is a decode of some sequences behind a context each, or a prompt in one chunk; the head
over the rows that give a token is part of it. With one thread the figures are processor time, which
a busy machine changes little, else seconds; each is the median over the turns. The last line is
JSON: by pass, ``default_ms``, ``deterministic_ms`` and ``ratio``.

    .venv/bin/python bench/deterministic.py                        # the embedded model, one thread
    .venv/bin/python bench/deterministic.py --dtype bfloat16 --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from minserve import Engine
from minserve.blocks import blocks_for
from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.runner import ModelRunner, model_runner
from minserve.progress_bar import progress_bar
from shared.machine import machine
from shared.program import positive, run_program

CONTEXT, PROMPT = 256, 1024
DECODES = (1, 8, 32)
BLOCK_SIZE, NUM_BLOCKS = 32, 320


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--turns", type=positive, default=7)
    return parser.parse_args(argv)


def load(args: argparse.Namespace, deterministic: bool) -> ModelRunner:
    engine = Engine(
        args.model,
        dtype=args.dtype,
        threads=args.threads,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        deterministic=deterministic,
    )
    return model_runner(engine._core.runner)


def batches() -> dict[str, list[Chunk]]:
    """Return the chunks of each pass, by its name."""
    own = blocks_for(CONTEXT + 1, BLOCK_SIZE)
    found = {
        f"decode {num}": [
            Chunk([5], CONTEXT, list(range(i * own, (i + 1) * own))) for i in range(num)
        ]
        for num in DECODES
    }
    table = list(range(blocks_for(PROMPT, BLOCK_SIZE)))
    return {**found, f"prefill {PROMPT}": [Chunk(list(range(5, 5 + PROMPT)), 0, table)]}


@torch.inference_mode()
def seconds(runner: ModelRunner, chunks: list[Chunk], threads: int) -> float:
    """Run one pass and return how long it took."""
    clock = time.process_time if threads == 1 else time.perf_counter
    num_decodes = sum(len(chunk.token_ids) == 1 for chunk in chunks)
    begin = clock()
    hidden = runner.forward(chunks, num_decodes)
    runner.model.logits(hidden[-len(chunks) :])
    return clock() - begin


def main() -> None:
    args = parse_args()
    runners = {name: load(args, name == "deterministic") for name in ("default", "deterministic")}
    result: dict[str, dict[str, float]] = {}
    for kind, chunks in progress_bar(batches().items()):
        found: dict[str, list[float]] = {name: [] for name in runners}
        for turn in range(args.turns + 1):
            for name, runner in runners.items():
                took = seconds(runner, chunks, args.threads)
                if turn:  # the first one warms up
                    found[name].append(took)
        ms = {f"{name}_ms": 1000 * statistics.median(own) for name, own in found.items()}
        ratio = ms["deterministic_ms"] / ms["default_ms"]
        result[kind] = {name: round(value, 2) for name, value in {**ms, "ratio": ratio}.items()}
        print(f"{kind}: {result[kind]}")
    print(json.dumps({**result, "dtype": args.dtype, "threads": args.threads, **machine()}))


if __name__ == "__main__":
    run_program(main)
