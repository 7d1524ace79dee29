"""Greedy tokens of an engine on the GPU beside transformers' on the same GPU, in float32.

The engine serves all prompts at once, with CUDA graphs, chunks of few tokens and drafts, so that
decodes, verifications and prefills run in every kind of batch. A token may differ only where
transformers itself is as good as undecided. The last line is JSON.

    python bench/parts/gpu/parity.py [--dry]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minserve import Engine, SamplingParams
from minserve.engine.device.runner import model_runner
from shared.failing import FailureLog
from shared.reference_models.reference import VOCAB, reference_model, save
from shared.reference_models.variants import ModelVariant
from shared.synthetic_models import write_words

CASES = [
    ModelVariant("llama", "llama", {"hidden_size": 192, "num_attention_heads": 6}),
    ModelVariant("opt", "opt", {"hidden_size": 192, "num_attention_heads": 6}),
]
# Two tokens whose logits are nearer than this are a tie, in arithmetic of other orders.
TIE = 1e-3


class ParityEffort(NamedTuple):
    """The device, tokens of the prompts, and tokens behind each."""

    device: str
    lengths: tuple[int, ...]
    num_tokens: int


FULL = ParityEffort("cuda", (1, 5, 37, 60, 90, 123), 32)
DRY = ParityEffort("cpu", (1, 5), 2)


@torch.inference_mode()
def gap(model: torch.nn.Module, token_ids: list[int], place: int) -> float:
    """Return by how much transformers prefers its best token at a place over the one that is there."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([token_ids[:place]], device=device)).logits[0, -1].float()
    return float(logits.max() - logits[token_ids[place]])


def compare(case: ModelVariant, effort: ParityEffort, speculator: str) -> dict[str, Any]:
    """Return how many tokens of an engine are not transformers' own, in one case."""
    reference = reference_model(case)
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in effort.lengths]
    params = SamplingParams(temperature=0.0, max_tokens=effort.num_tokens, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        path = save(reference, Path(folder), case)
        write_words(path, VOCAB)
        engine = Engine(
            str(path), device=effort.device, dtype="float32",
            num_blocks=200, token_budget=64, max_num_seqs=8, policy="sarathi",
            speculator=speculator, max_speculation=3, attention_backend="triton",
        )  # fmt: skip
        results = engine.generate(prompts, params)
    graphs = model_runner(engine._core.runner).graphs
    reference.to(effort.device)
    wrong = sum(
        gap(reference, [*prompt, *result.outputs[0].token_ids], place) > TIE
        for prompt, result in zip(prompts, results, strict=True)
        for place in range(len(prompt), len(prompt) + effort.num_tokens)
    )
    mixed = None if graphs is None else list(graphs.mixed)
    return {"case": case.name, "speculator": speculator, "wrong": wrong, "mixed_graphs": mixed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="one case, on a CPU")
    args = parser.parse_args()
    effort = DRY if args.dry else FULL
    torch.backends.cuda.matmul.allow_tf32 = False
    runs = [(case, how) for case in CASES for how in ("off", "ngram")][: 1 if args.dry else None]
    rows: list[dict[str, Any]] = []
    failures = FailureLog()
    for case, speculator in runs:
        try:
            rows.append(compare(case, effort, speculator))
        except Exception as error:  # one case must not hide the others
            failures.add(f"{case.name}, {speculator}", error)
    passed = not failures.lines and not any(row["wrong"] for row in rows)
    print(json.dumps({"passed": passed, "rows": rows, "failures": failures.lines, "dry": args.dry}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
