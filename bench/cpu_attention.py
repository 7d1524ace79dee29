"""Compares forms of attention on this CPU, for decodes and prefill chunks: speed and exactness.

Every form reads the paged cache of a layer as the engine keeps it; several layers take turns, so
that no CPU cache makes a form look faster than it is. Measure on an idle machine; it takes half a
minute. The error is the largest deviation from float64, divided by that of the plain computation
(matmul, softmax, matmul) in the same dtype; a backend must not exceed 2. The last line is JSON.

    .venv/bin/python bench/cpu_attention.py
    .venv/bin/python bench/cpu_attention.py --heads 32 8 64 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.attention import AttentionMetadata, LayerKV
from minserve.kernels.torch_backend import TorchBackend
from minserve.progress_bar import progress_bar
from minserve.tables import text_table
from shared.cpu_ceilings import milliseconds

BLOCK_SIZE = 32
NUM_LAYERS = 6
# Sequences, tokens computed before, and tokens to run of each. Batches of many sequences have a
# short context, so that a run takes less than a minute.
CASES = (
    *((num, context, 1) for num in (1, 8, 32) for context in (192, 1024)),
    *((1, 0, num) for num in (64, 256, 1024)),
    (1, 512, 64),
    (1, 512, 512),
)
OURS = "two matmuls"


class AttentionCase(NamedTuple):
    """A batch, with the layers' caches that it reads, and its queries."""

    backend: TorchBackend
    metadata: AttentionMetadata
    layers: list[LayerKV]
    query: Tensor
    group: int

    @property
    def num_seqs(self) -> int:
        return self.metadata.num_seqs

    def gathered(self, kv: LayerKV) -> tuple[Tensor, Tensor]:
        """Return keys and values, each ``[sequences, kv heads, tokens, head_dim]``."""
        return tuple(
            part[self.metadata.block_tables].flatten(1, 2)[:, : self.metadata.seq_lens[0]]
            .transpose(1, 2).contiguous()
            for part in (kv.key, kv.value)
        )  # fmt: skip

    def queries(self) -> Tensor:
        """Return the queries as ``[sequences, heads, queries, head_dim]``."""
        heads, dim = self.query.shape[1:]
        return self.query.view(self.num_seqs, -1, heads, dim).transpose(1, 2)


def make_case(
    heads: tuple[int, int, int], dtype: torch.dtype, size: tuple[int, int, int]
) -> AttentionCase:
    """Return a case with random keys, values and queries; a lone sequence has adjacent blocks."""
    num_heads, num_kv_heads, head_dim = heads
    num_seqs, context, num_queries = size
    length = context + num_queries
    per_seq = -(-length // BLOCK_SIZE)
    order = list(range(num_seqs * per_seq))
    if num_seqs > 1:
        random.Random(0).shuffle(order)
    tables = torch.tensor(order).view(num_seqs, per_seq)
    positions = torch.arange(context, length)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    metadata = AttentionMetadata(
        query_start_loc=list(range(0, num_seqs * num_queries + 1, num_queries)),
        seq_lens=[length] * num_seqs,
        block_tables=tables,
        slot_mapping=slots.flatten(),
        block_size=BLOCK_SIZE,
        num_decodes=num_seqs if num_queries == 1 else 0,
    )
    backend = TorchBackend(num_heads, num_kv_heads, head_dim, head_dim**-0.5)
    backend.prepare(metadata)
    layers = []
    for _ in range(NUM_LAYERS):
        kv = backend.allocate(len(order), BLOCK_SIZE, dtype, torch.device("cpu"))
        for part in (kv.key, kv.value):
            part.copy_(torch.randn(part.shape))
        layers.append(kv)
    query = torch.randn(num_seqs * num_queries, num_heads, head_dim).to(dtype)
    return AttentionCase(backend, metadata, layers, query, num_heads // num_kv_heads)


def ours(case: AttentionCase, kv: LayerKV) -> Tensor:
    return case.backend.forward(case.query, kv, case.metadata).view(case.query.shape)


def ours_in_float32(case: AttentionCase, kv: LayerKV) -> Tensor:
    """Run `ours` on queries in float32, as in passes over a few tokens."""
    out = case.backend.forward(case.query.float(), kv, case.metadata)
    return out.view(case.query.shape).to(case.query.dtype)


def sdpa(case: AttentionCase, kv: LayerKV) -> Tensor:
    """Run torch's fused attention, which supports GQA."""
    query = case.queries()
    num_queries, length = query.shape[2], case.metadata.seq_lens[0]
    causal = num_queries == length
    mask = None
    if num_queries > 1 and not causal:
        position = torch.arange(length)
        mask = position <= position[-num_queries:].unsqueeze(1)
    out = F.scaled_dot_product_attention(
        query, *case.gathered(kv), attn_mask=mask, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def sdpa_packed(case: AttentionCase, kv: LayerKV) -> Tensor:
    """Run torch's fused attention with a group's heads as queries of one head; decodes only."""
    key, value = case.gathered(kv)
    query = case.query.view(case.num_seqs, -1, case.group, case.query.shape[2])
    return F.scaled_dot_product_attention(query, key, value).reshape(case.query.shape)


def plain(case: AttentionCase, kv: LayerKV, dtype: torch.dtype) -> Tensor:
    """Run matmul, softmax and matmul in a dtype, written out."""
    key, value = (part.to(dtype).repeat_interleave(case.group, 1) for part in case.gathered(kv))
    query = case.queries().to(dtype)
    position = torch.arange(key.shape[2])
    seen = position <= position[-query.shape[2] :].unsqueeze(1)
    scores = query @ key.transpose(2, 3) * case.backend.scale
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).flatten(0, 1)


FORMS: dict[str, Callable[[AttentionCase, LayerKV], Tensor]] = {
    OURS: ours,
    "in float32": ours_in_float32,
    "SDPA": sdpa,
    "SDPA packed": sdpa_packed,
}


@torch.inference_mode()
def measure(case: AttentionCase, repeats: int) -> dict[str, dict[str, float]]:
    """Return for each form the microseconds per layer and the error, as described above."""
    first = case.layers[0]
    exact = plain(case, first, torch.float64)
    allowed = (plain(case, first, case.query.dtype).double() - exact).abs().max()
    found = {}
    for name, form in FORMS.items():
        if form is sdpa_packed and case.metadata.num_decodes == 0:
            continue
        error = (form(case, first).double() - exact).abs().max()

        def all_layers(form: Callable[[AttentionCase, LayerKV], Tensor] = form) -> None:
            for kv in case.layers:
                form(case, kv)

        found[name] = {
            "us": round(milliseconds(all_layers, repeats) * 1e3 / len(case.layers), 1),
            "error": round((error / allowed).item(), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, nargs=3, default=(9, 3, 64),
                        metavar=("HEADS", "KV_HEADS", "HEAD_DIM"))  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.threads} threads, {args.dtype}; microseconds a layer (error, plain = 1)")
    rows, cells = [], []
    for size in progress_bar(CASES, desc="Measuring", unit="case", leave=False):
        case = make_case(tuple(args.heads), getattr(torch, args.dtype), size)
        found = measure(case, args.repeats)
        num_seqs, context, num_tokens = size
        measured = (f"{one['us']:.0f} ({one['error']:.1f})" for one in found.values())
        cells.append((f"{num_seqs} x ({context} + {num_tokens})", *measured))
        rows.append(
            {"sequences": num_seqs, "context": context, "tokens": num_tokens, "forms": found}
        )
    print(text_table(("sequences x (context + tokens)", *FORMS), cells))
    print(
        json.dumps(
            {
                "dtype": args.dtype,
                "threads": args.threads,
                "worst_error": max(row["forms"][OURS]["error"] for row in rows),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
