"""Measures how many seeded outputs are the same alone and in a batch.

Each output is generated alone, and again in a batch of mixed settings, with the same seed. Where
rounding differs between the two, near ties may be decided otherwise, and the text goes another way
from there on. The last line is JSON, by dtype: ``outputs``, ``equal``, ``same_tokens``: the
tokens before the first difference, or all of them, added up, and ``tokens``.

    .venv/bin/python bench/seeds.py                                # float32; some minutes
    .venv/bin/python bench/seeds.py --dtypes float32 bfloat16 --deterministic
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from minserve import Engine, SamplingParams
from minserve.progress_bar import progress_bar
from shared.machine import machine
from shared.program import positive, run_program

PROMPTS = (
    "The history of Rome begins",
    "def quicksort(items):",
    "Once upon a time",
    "The three most important ideas in physics are",
    "Dear Sir or Madam,",
    "Q: Why is the sky blue?\nA:",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "min_p": 0.05},
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--outputs", type=positive, default=48)
    parser.add_argument("--tokens", type=positive, default=100)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--deterministic", action="store_true")
    return parser.parse_args(argv)


def requests(args: argparse.Namespace) -> list[tuple[str, SamplingParams]]:
    """Return the prompts and settings of all outputs."""
    return [
        (
            PROMPTS[i % len(PROMPTS)],
            SamplingParams(
                seed=i, max_tokens=args.tokens, ignore_eos=True, **SETTINGS[i % len(SETTINGS)]
            ),
        )
        for i in range(args.outputs)
    ]


def token_ids(engine: Engine, batch: Sequence[tuple[str, SamplingParams]]) -> list[list[int]]:
    """Return the tokens of outputs that run together."""
    prompts, params = zip(*batch, strict=True)
    return [list(one.outputs[0].token_ids) for one in engine.generate(list(prompts), list(params))]


def num_same(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens before the first difference."""
    pairs = zip(one, other, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one))


def measure(args: argparse.Namespace, dtype: str) -> dict[str, int]:
    """Generate all outputs alone and in batches, and compare them."""
    settings = {"threads": args.threads} if args.threads else {}
    if args.deterministic:
        settings["deterministic"] = True
    engine = Engine(args.model, dtype=dtype, prefix_caching=False, **settings)
    every = requests(args)
    alone, together = [], []
    for one in progress_bar(every, desc=f"{dtype}, alone"):
        alone += token_ids(engine, [one])
    for start in progress_bar(range(0, len(every), args.batch), desc=f"{dtype}, together"):
        together += token_ids(engine, every[start : start + args.batch])
    same = [num_same(a, b) for a, b in zip(alone, together, strict=True)]
    return {
        "outputs": len(same),
        "equal": sum(num == args.tokens for num in same),
        "same_tokens": sum(same),
        "tokens": args.tokens * len(same),
    }


def main() -> None:
    args = parse_args()
    found = {dtype: measure(args, dtype) for dtype in args.dtypes}
    for dtype, one in found.items():
        print(f"{dtype}: {one['equal']} of {one['outputs']} outputs are equal")
    print(json.dumps({**found, "deterministic": args.deterministic, "machine": machine()}))


if __name__ == "__main__":
    run_program(main)
