"""Compares the forms of a linear's weight on this CPU, by the number of rows.

First it measures the machine's limits. Then it runs all linears of the model's layers once per
measurement, so that no weight stays in a cache, and then the language model's head. The last
line is JSON.

    .venv/bin/python bench/linears.py
"""

from __future__ import annotations

import argparse
import json

import torch

from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightFormat, WeightPlacement
from minserve.progress_bar import progress_bar
from minserve.tables import text_table
from shared.cpu_ceilings import ceilings, fast_bf16, pass_milliseconds

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# A head is run only for the last token of each sequence.
HEAD_ROWS = tuple(rows for rows in ROWS if rows <= 128)


def forms() -> dict[str, WeightPlacement]:
    """Return the forms of a weight that make sense on this CPU."""
    cpu = torch.device("cpu")
    found = {
        "float32": WeightPlacement(cpu, torch.float32, torch.float32, WeightFormat.DENSE),
        "float32 onednn": WeightPlacement(cpu, torch.float32, torch.float32, WeightFormat.ONEDNN),
        "float16 fbgemm": WeightPlacement(
            cpu, torch.float32, torch.float16, WeightFormat.FBGEMM_FP16
        ),
        "int8 fbgemm": WeightPlacement.choose(cpu, "auto", quantization="int8"),
    }
    if fast_bf16():
        found["bfloat16"] = WeightPlacement(cpu, torch.bfloat16, torch.bfloat16, WeightFormat.DENSE)
        found["bfloat16 onednn"] = WeightPlacement(
            cpu, torch.bfloat16, torch.bfloat16, WeightFormat.ONEDNN
        )
    return found


def linear_shapes(model: str) -> tuple[int, list[tuple[int, int]], tuple[int, int]]:
    """Return a Llama's layers, ``[out, in]`` of a layer's four linears, and that of the head."""
    config = load_config(find_model(model))
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [
        (heads * config.head_dim, hidden),
        (hidden, config.num_attention_heads * config.head_dim),
        (2 * inner, hidden),
        (hidden, inner),
    ]
    return config.num_hidden_layers, shapes, (config.vocab_size, hidden)


def sweep(
    placement: WeightPlacement,
    num_layers: int,
    shapes: list[tuple[int, int]],
    all_rows: tuple[int, ...] = ROWS,
) -> dict[int, float]:
    """Return the milliseconds for all linears of all layers, by rows of input."""
    weights = [torch.randn(shape) * 0.02 for _ in range(num_layers) for shape in shapes]
    linears = [placement.linear(weight) for weight in weights]
    times = {}
    for rows in all_rows:
        inputs = [torch.randn(rows, width).to(placement.dtype) for _, width in shapes]
        calls = [(linear, inputs[i % len(inputs)]) for i, linear in enumerate(linears)]
        times[rows] = round(pass_milliseconds(calls, 7 if rows < 256 else 3), 1)
    return times


def print_table(title: str, times: dict[str, dict[int, float]]) -> None:
    """Print a line for each number of rows, with a column for each form."""
    print(title)
    lines = []
    for rows in next(iter(times.values())):
        best = min(times, key=lambda name: times[name][rows])
        cells = (f"{times[name][rows]}{'*' if name == best else ''}" for name in times)
        lines.append((rows, *cells))
    print(text_table(("rows", *times), lines, left=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a Llama; only its shapes are used")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limits = ceilings()
    print(f"{args.threads} threads; ceilings: {limits}")
    num_layers, shapes, head = linear_shapes(args.model)
    layers, head_times = {}, {}
    for name, placement in progress_bar(forms().items(), desc="Measuring", unit="form"):
        layers[name] = sweep(placement, num_layers, shapes)
        head_times[name] = sweep(placement, 1, [head], HEAD_ROWS)
    print_table("milliseconds for all linears of all layers; * is the fastest", layers)
    print_table("milliseconds for the head", head_times)
    print(json.dumps({"ceilings": limits, "ms": layers, "head_ms": head_times}))


if __name__ == "__main__":
    main()
