"""Compares quantized weights and KV caches with plain ones: the loss of quality, the gain in speed.

The text is Python's own language reference, which comes with Python. Quality is measured against
float32: the perplexity of the text, how far its next tokens' distributions are from the
reference's, and how far greedy outputs stay the same. Forms of the KV cache have weights
in float32, so that nothing else differs. The last line is JSON.

    .venv/bin/python bench/quantization.py
    .venv/bin/python bench/quantization.py --no-speed --form kv-int8 --form kv-fp8
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pydoc_data.topics import topics

import torch

from minserve import Engine, SamplingParams
from minserve.blocks import blocks_for
from minserve.config import KV_CACHE_DTYPES, QUANTIZATIONS
from minserve.cpu_name import cpu_name
from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.runner import model_runner
from minserve.progress_bar import progress_bar
from minserve.tables import text_table

WINDOW = 256
PROMPT, OUTPUT = 32, 64
BATCHES = (1, 8, 32)
PREFILL, REPEATS = 1024, 3


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of one form of the weights.

    Attributes:
        perplexity: perplexity of the text's windows.
        divergence: mean Kullback-Leibler divergence of the next token's distribution from the
            reference's, over all places of the text, in nats.
        same_best: share of places where the most likely token is the reference's.
        logprob_error: mean distance of the log probabilities of the text's tokens from the
            reference's, in nats.
        same_prefix: share of greedy tokens before the first that differs from the reference's.
        same_outputs: share of outputs that equal the reference's from end to end.
    """

    perplexity: float
    divergence: float
    same_best: float
    logprob_error: float
    same_prefix: float
    same_outputs: float


def windows(engine: Engine, count: int) -> list[list[int]]:
    """Return disjoint windows of the text, in tokens."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = engine.tokenizer.encode(text)
    step = max(WINDOW, len(ids) // count)
    return [ids[start : start + WINDOW] for start in range(0, step * count, step)][:count]


def text_logprobs(engine: Engine, texts: list[list[int]]) -> torch.Tensor:
    """Return the log probability of each token of the texts, without each text's first token."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = engine.generate(texts, params)
    return torch.tensor([one.logprob for out in outputs for one in out.prompt_logprobs[1:]])


@torch.inference_mode()
def next_tokens(engine: Engine, text: list[int]) -> torch.Tensor:
    """Return log probabilities ``[tokens, vocabulary]`` of what follows each token of a text."""
    runner = model_runner(engine._core.runner)
    blocks = list(range(blocks_for(len(text), runner.block_size)))
    hidden = runner.forward([Chunk(text, 0, blocks)], 0)
    return runner.model.logits(hidden).float().log_softmax(-1)


def distance(engine: Engine, reference: Engine, texts: list[list[int]]) -> tuple[float, float]:
    """Return `Quality.divergence` and `Quality.same_best`."""
    divergences, same = [], []
    for text in texts:
        want, got = next_tokens(reference, text), next_tokens(engine, text)
        divergences.append((want.exp() * (want - got)).sum(-1))
        same.append((want.argmax(-1) == got.argmax(-1)).float())
    return torch.cat(divergences).mean().item(), torch.cat(same).mean().item()


def greedy(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Return greedy outputs of `OUTPUT` tokens, with all prompts in one batch."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    return [list(out.outputs[0].token_ids) for out in engine.generate(prompts, params)]


def same_prefix(one: list[int], other: list[int]) -> int:
    """Return the number of tokens before the first difference."""
    pairs = zip(one, other, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))


def speed(engine: Engine) -> dict[str, float]:
    """Return median tokens per second of decodes, by batch, and of a prefill."""

    def seconds(batch: int, prompt: int, output: int) -> float:
        prompts = [[100 + i] * prompt for i in range(batch)]
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        started = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - started

    rates: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for batch in BATCHES:
            decoding = seconds(batch, PROMPT, 1 + OUTPUT) - seconds(batch, PROMPT, 1)
            rates.setdefault(f"decode_b{batch}", []).append(batch * OUTPUT / decoding)
        rates.setdefault(f"prefill_{PREFILL}", []).append(PREFILL / seconds(1, PREFILL, 1))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", help="of the quantized forms")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--windows", type=int, default=20, help=f"each of {WINDOW} tokens")
    parser.add_argument("--no-speed", action="store_true", help="measure the quality alone")
    kv_forms = [name for name in KV_CACHE_DTYPES if name != "auto"]
    names = (*QUANTIZATIONS, *(f"kv-{name}" for name in kv_forms))
    parser.add_argument(
        "--form", action="append", choices=names, help="may be repeated; default: all"
    )
    args = parser.parse_args()
    every = {name: {"dtype": args.dtype, "quantization": name} for name in QUANTIZATIONS}
    every |= {f"kv-{name}": {"dtype": "float32", "kv_cache_dtype": name} for name in kv_forms}
    forms = {"float32": {"dtype": "float32"}}
    forms |= {name: settings for name, settings in every.items() if name in (args.form or names)}
    rows: dict[str, dict[str, float]] = {}
    reference: tuple[Engine, torch.Tensor, list[list[int]]] | None = None
    for name, settings in progress_bar(forms.items(), desc="Measuring", unit="form"):
        engine = Engine(args.model, prefix_caching=False, threads=args.threads, **settings)
        texts = windows(engine, args.windows)
        logprobs, outputs = (
            text_logprobs(engine, texts),
            greedy(engine, [t[:PROMPT] for t in texts]),
        )
        reference = reference or (engine, logprobs, outputs)
        same = [same_prefix(a, b) for a, b in zip(outputs, reference[2], strict=True)]
        divergence, same_best = distance(engine, reference[0], texts)
        quality = Quality(
            perplexity=math.exp(-logprobs.mean().item()),
            divergence=divergence,
            same_best=same_best,
            logprob_error=(logprobs - reference[1]).abs().mean().item(),
            same_prefix=statistics.mean(same) / OUTPUT,
            same_outputs=statistics.mean(n == OUTPUT for n in same),
        )
        rows[name] = {key: round(value, 5) for key, value in asdict(quality).items()}
        if not args.no_speed:
            rows[name] |= speed(engine)
    keys = next(iter(rows.values()))
    print(text_table(("", *rows), [(key, *(row[key] for row in rows.values())) for key in keys]))
    threads = torch.get_num_threads()
    print(json.dumps({"device": cpu_name(), "threads": threads, "forms": rows}))


if __name__ == "__main__":
    main()
