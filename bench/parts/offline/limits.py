"""Physical limits of the rows of `offline.py`: no engine can be faster on this machine.

A forward pass takes at least as long as its matmuls alone, with the weights in the form in which
minserve keeps them, and at least as long as reading all weights and all keys and values once; the
longer of the two times is the limit. Run as a script, this file loads minserve's engine, measures
its linears and the memory, and prints them as an event.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # The interpreter put this script's own folder first, but imports begin at `bench/`.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from parts.offline.measure import BATCHES, CONTEXT, DECODES, NEW_PROMPT, OUTPUT, PREFILL, PROMPT

if TYPE_CHECKING:
    import torch

    from minserve.models.layers import Linear

BITS = {"int8": 8}


@dataclass(frozen=True, slots=True)
class Pass:
    """The forward pass that a row consists of.

    Attributes:
        rows: tokens that go through the layers.
        head_rows: of these, the tokens whose logits are wanted.
        kv_tokens: tokens whose keys and values are read.
        worth: what one pass adds to the row: a number of tokens, or one step.
    """

    rows: int
    head_rows: int
    kv_tokens: float
    worth: float


# A decode reads the prompt's KV and, on average over the output, that of half the output.
PASSES: Mapping[str, Pass] = {
    **{
        f"decode_b{batch}": Pass(batch, batch, batch * (PROMPT + OUTPUT / 2), batch)
        for batch in BATCHES
    },
    "prefill_1024": Pass(PREFILL, 1, PREFILL, PREFILL),
    "mixed_step": Pass(
        DECODES + NEW_PROMPT, DECODES + 1, DECODES * CONTEXT + NEW_PROMPT, 1
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLimits:
    """Measurements of the machine and the model.

    Attributes:
        copy_gb_s, read_gb_s: rates of memory; a copy counts bytes read and bytes written.
        weight_bytes: bytes of all weights that a pass reads, without the scales of quantized ones.
        kv_bytes: bytes of one token's KV.
        linears_ms: milliseconds of all linears once, with the activations within them, by row.
    """

    copy_gb_s: float
    read_gb_s: float
    weight_bytes: float
    kv_bytes: float
    linears_ms: Mapping[str, float]

    def streaming_ms(self, row: str) -> float:
        """Return the milliseconds to read all weights and the row's keys and values once."""
        read = self.weight_bytes + self.kv_bytes * PASSES[row].kv_tokens
        return read / self.read_gb_s / 1e6

    def bound_by(self, row: str) -> str:
        """Return which of the two limits is a row's: its linears, or streaming."""
        return "linears" if self.linears_ms[row] >= self.streaming_ms(row) else "streaming"

    def rate(self, row: str) -> float:
        """Return the limit of a row, in its unit."""
        slower = max(self.linears_ms[row], self.streaming_ms(row))
        return 1e3 * PASSES[row].worth / slower

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements and the limit of each row as JSON values."""
        return {
            "copy_gb_s": round(self.copy_gb_s, 1),
            "read_gb_s": round(self.read_gb_s, 1),
            "weight_mb": round(self.weight_bytes / 1e6, 1),
            "kv_bytes_per_token": self.kv_bytes,
            "rows": {
                row: {
                    "linears_ms": round(self.linears_ms[row], 2),
                    "streaming_ms": round(self.streaming_ms(row), 2),
                    "kv_mb": round(self.kv_bytes * PASSES[row].kv_tokens / 1e6, 1),
                    "bound_by": self.bound_by(row),
                    "limit": round(self.rate(row), 1),
                }
                for row in PASSES
            },
        }


def best(measured: Sequence[Mapping[str, Any]]) -> MeasuredLimits:
    """Return the limits of several measurements, with the fastest value of any of them."""
    first = measured[0]
    return MeasuredLimits(
        copy_gb_s=max(one["copy_gb_s"] for one in measured),
        read_gb_s=max(one["read_gb_s"] for one in measured),
        weight_bytes=first["weight_bytes"],
        kv_bytes=first["kv_bytes"],
        linears_ms={row: min(one["linears_ms"][row] for one in measured) for row in PASSES},
    )


def shares(rates: Mapping[str, float], limits: MeasuredLimits) -> dict[str, float]:
    """Return the shares of the limits that the measured rows reach."""
    return {row: round(rates[row] / limits.rate(row), 3) for row in PASSES if row in rates}


def measured(model: str, dtype: str, quantization: str | None) -> dict[str, Any]:
    """Load minserve's engine, and measure its linears and the memory."""
    import torch

    from minserve import Engine
    from minserve.engine.device.runner import model_runner
    from minserve.models.finding.source import find_model
    from minserve.models.llama import Llama
    from minserve.models.opt import OPT
    from minserve.models.weights.loader import open_checkpoint
    from shared.cpu_ceilings import memory_rates, pass_milliseconds

    settings = {} if quantization is None else {"quantization": quantization}
    engine = Engine(model, dtype=dtype, kv_cache_gib=0.1, **settings)
    runner = model_runner(engine._loaded.core.runner)
    own, shape = runner.model, runner.model.shape
    assert isinstance(own, Llama | OPT), "its linears are known"
    with open_checkpoint(find_model(model), progress=False) as checkpoint:
        num_weights = checkpoint.num_parameters()
        if "lm_head.weight" in checkpoint.names():  # of the embedding only one row is read
            num_weights -= shape.vocab_size * shape.hidden_size
    bits = BITS.get(quantization) or 8 * own.placement.weight_dtype.itemsize

    def calls(one: Pass) -> list[tuple[Linear, torch.Tensor]]:
        def rows(num: int, width: int) -> torch.Tensor:
            return torch.randn(num, width).to(own.placement.pass_dtype(num))

        narrow = rows(one.rows, shape.hidden_size)
        heads = rows(one.rows, shape.num_heads * shape.head_dim)
        inner = own.layers[0].linears[2](narrow)
        inputs = (narrow, heads, narrow, inner)
        pairs = [pair for layer in own.layers for pair in zip(layer.linears, inputs, strict=True)]
        return [*pairs, (own.head, rows(one.head_rows, shape.hidden_size))]

    kv_itemsize = runner.kv[0].dtype.itemsize
    return {
        **memory_rates(),
        "weight_bytes": num_weights * bits / 8,
        "kv_bytes": 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * kv_itemsize,
        "linears_ms": {
            row: pass_milliseconds(calls(one), 7 if one.rows < 256 else 3)
            for row, one in PASSES.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    args = parser.parse_args()
    limits = measured(args.model, args.dtype, args.quantization)
    print(json.dumps({"event": "limits", "limits": limits}), flush=True)


if __name__ == "__main__":
    main()
