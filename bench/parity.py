"""Compare every family and variant of models with transformers: logits and greedy tokens.

For each case a random model is saved in Hugging Face or GGUF form, loaded by both, and run on
prompts of odd lengths: transformers runs each prompt whole, minserve runs mixed batches of prefill
chunks and decodes over a paged cache with scattered blocks. In bfloat16 minserve may be no further
from transformers' float32 than transformers' own bfloat16 is. There is a line for each family; the
last line is JSON.

    .venv/bin/python bench/parity.py
    .venv/bin/python bench/parity.py --tensor-parallel 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minserve.engine.device.runner import ModelRunner
from minserve.progress_bar import progress_bar
from parts.parity.passes import chunked_logits, greedy, load, load_divided, make_runner
from parts.parity.rank_threads import RankThreads
from shared.reference_models.reference import VOCAB, choices_along, divides, reference_model, save
from shared.reference_models.variants import CASES, ModelVariant

CHUNKS = (256, 17, 1)
GREEDY_TOKENS = 64
TOLERANCE = 1e-4
# The error of minserve in bfloat16, beside that of transformers in bfloat16: both round, in other
# places.
BFLOAT16_SHARE = 1.25


@dataclass
class ParityResult:
    """What a comparison found.

    Attributes:
        error: largest difference of a logit in float32; in bfloat16 the error as a share of
            transformers' own.
        mismatches: a line for every difference that is too large.
    """

    error: float = 0.0
    mismatches: list[str] = field(default_factory=list)


def prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    """Return one random prompt per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def compare(case: ModelVariant, ranks: RankThreads | None = None) -> ParityResult:
    """Run one case, on the ranks of a group if there are any."""
    reference = reference_model(case)
    with tempfile.TemporaryDirectory() as folder:
        path = save(reference, Path(folder), case)
        if ranks is None:
            runner = make_runner(*load(path, case.dtype, case.longest))
        else:
            runner = make_runner(*load_divided(path, ranks, case.dtype, case.longest))
    token_lists = prompts(case.lengths)
    expected = _logits(reference, token_lists)
    result = ParityResult()
    if case.dtype == "bfloat16":
        _compare_rounded(reference, expected, runner, token_lists, result)
    else:
        _compare_exact(expected, runner, token_lists, result)
        if case.continues:
            result.mismatches += _greedy_mismatches(reference, runner, token_lists)
    result.mismatches = [f"{case.name}: {line}" for line in result.mismatches]
    return result


@torch.inference_mode()
def _logits(reference: torch.nn.Module, token_lists: list[list[int]]) -> list[torch.Tensor]:
    return [reference(torch.tensor([tokens])).logits[0].float() for tokens in token_lists]


def _compare_exact(
    expected: list[torch.Tensor],
    runner: ModelRunner,
    token_lists: list[list[int]],
    result: ParityResult,
) -> None:
    for chunk in CHUNKS:
        for want, got in zip(expected, chunked_logits(runner, token_lists, chunk), strict=True):
            error = (want - got).abs().max().item()
            result.error = max(result.error, error)
            if not error <= TOLERANCE:
                result.mismatches.append(
                    f"{len(want)} tokens in chunks of {chunk}: logits differ by {error:.2e}"
                )


def _compare_rounded(
    reference: torch.nn.Module,
    expected: list[torch.Tensor],
    runner: ModelRunner,
    token_lists: list[list[int]],
    result: ParityResult,
) -> None:
    """Compare mean square errors: of single logits, either may be further off by chance."""
    want = torch.cat(expected)
    theirs = torch.cat(_logits(reference.bfloat16(), token_lists))
    allowed = (theirs - want).square().mean().sqrt().item()
    for chunk in CHUNKS:
        got = torch.cat(chunked_logits(runner, token_lists, chunk))
        share = (got - want).square().mean().sqrt().item() / allowed
        result.error = max(result.error, share)
        if not share <= BFLOAT16_SHARE:
            result.mismatches.append(f"in chunks of {chunk}: {share:.2f} of transformers' error")


def _greedy_mismatches(
    reference: torch.nn.Module, runner: ModelRunner, token_lists: list[list[int]]
) -> Iterator[str]:
    for tokens, got in zip(token_lists, greedy(runner, token_lists, GREEDY_TOKENS), strict=True):
        if len(got) != GREEDY_TOKENS or got != choices_along(reference, tokens, got):
            yield f"greedy continuation of {len(tokens)} tokens differs"


def _family_line(family: str, results: list[tuple[ModelVariant, ParityResult]]) -> str:
    """Say in a line how far a family's cases are from transformers."""

    def largest(dtype: str) -> float:
        return max((r.error for case, r in results if case.dtype == dtype), default=0.0)

    wrong = sum(bool(result.mismatches) for _, result in results)
    return (
        f"{family:8} {len(results):2} cases, {wrong} wrong; logits within {largest('float32'):.0e} "
        f"in float32, at {largest('bfloat16'):.2f} of transformers' error in bfloat16"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="divide each model among N ranks, threads of this process; cases whose heads or MLP "
        "do not divide are left out",
    )
    size = parser.parse_args().tensor_parallel
    torch.set_num_threads(1)
    cases = [case for case in CASES if divides(case, size)]
    families: dict[str, list[tuple[ModelVariant, ParityResult]]] = {}
    with RankThreads(size) if size > 1 else nullcontext() as ranks:
        for case in progress_bar(cases, desc="Parity", unit="case"):
            families.setdefault(case.family, []).append((case, compare(case, ranks)))
    for family, results in families.items():
        print(_family_line(family, results))
    mismatches = [
        line for results in families.values() for _, r in results for line in r.mismatches
    ]
    for line in mismatches:
        print(line)
    print(json.dumps({"cases": len(cases), "mismatches": len(mismatches)}))


if __name__ == "__main__":
    main()
