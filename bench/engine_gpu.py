"""Compares the engine with the machine's ceiling, on models of real shape with random weights.

A decode step reads all weights and the KV of its sequences once; its floor is these bytes over the
measured copy bandwidth. Then it measures drafts' verification, mixed batches, prefill, and iterations
of the whole engine beside the runner's alone (is planning hidden behind the device's work?), traces
what the device does in five of them (for how much of the time is it idle?), and compares all of them
with the planner's predictions. It notes what memory is free after the start and at the peak. The last
line is JSON.

    .venv/bin/python bench/engine_gpu.py --out engine.jsonl           # on an NVIDIA GPU
    .venv/bin/python bench/engine_gpu.py --model opt-6.7b --profile-seconds 0
    .venv/bin/python bench/engine_gpu.py --dry                        # tiny, on a CPU, by a GPU's ways
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from minserve.config import EngineConfig
from minserve.engine.build import load_engine
from minserve.engine.core import EngineCore
from minserve.engine.device.runner import model_runner
from minserve.engine.profile.profile_design import ProfileBatch
from minserve.engine.profile.profiler import profile_core
from minserve.engine.profile.workbench import Workbench
from minserve.engine.speculation.proposal import Proposal
from minserve.machine import GIB
from minserve.planner.predict.eager import NO_MIXED
from minserve.progress_bar import progress_bar
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from parts.engine_gpu.device_trace import trace_steps
from parts.engine_gpu.gpu_ways import follow_gpu_ways, gpu_ways
from parts.engine_gpu.idle import IdleMeter
from shared.failing import FailureLog
from shared.interpreter import choose_interpreter
from shared.kernel_timing import measure_ceilings
from shared.machine import gpu_machine
from shared.synthetic_models import SHAPES, linear_weights, random_weights, write_shape

GOAL_MODEL, GOAL_BATCH, GOAL_RATIO = "opt-6.7b", 64, 1.15
GOAL_R2 = 0.95
TRACED_STEPS = 5
GREEDY = SamplingParams(temperature=0.0)
# With random weights the logits are near each other, so the nucleus is most of the vocabulary.
NUCLEUS = SamplingParams(top_p=0.95)


class EngineEffort(NamedTuple):
    """The amount of measurement.

    Attributes:
        models: models that are measured by default.
        batches: numbers of decoding sequences in a step.
        context: tokens before each of them.
        drafted: number of tokens drafted for each sequence of a batch of verifications.
        mixed: number of decodes, and tokens of the chunk, in mixed batches.
        chunks: tokens of lone prefill chunks.
        repeats: measurements of each batch.
        engine: sequences and iterations of the whole engine.
        settings: the engine's settings.
    """

    models: tuple[str, ...]
    batches: tuple[int, ...]
    context: int
    drafted: int
    mixed: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...]
    repeats: int
    engine: tuple[int, int]
    settings: dict[str, Any]


FULL = EngineEffort(
    models=("opt-6.7b", "llama-3.1-8b", "smollm2-135m", "llama-3.2-1b"),
    batches=(1, 8, 32, 64, 128),
    context=512,
    drafted=3,
    mixed=((64, 512), (64, 64), (0, 128)),
    chunks=(512, 2048),
    repeats=15,
    engine=(64, 40),
    settings={
        "max_model_len": 2048,
        "token_budget": 2048,
        "max_num_seqs": 128,
        "speculator": "ngram",
        "max_speculation": 3,
        "policy": "sarathi",
    },
)
DRY = EngineEffort(
    models=("tiny-llama",),
    batches=(2,),
    context=20,
    drafted=2,
    mixed=((2, 12),),
    chunks=(16,),
    repeats=1,
    engine=(2, 3),
    settings={
        "max_model_len": 64, "token_budget": 32, "max_num_seqs": 4, "num_blocks": 16,
        "device": "cpu", "dtype": "float32", "attention_backend": "triton",
        "speculator": "ngram", "max_speculation": 2, "policy": "sarathi",
    },
)  # fmt: skip


def load(model: str, settings: dict[str, Any]) -> EngineCore:
    """Return an idle core with random weights, after the memory of the last core is freed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(Path(folder) / model, model, tokenizer=True)
        config = EngineConfig.create(str(path), **settings)
        with random_weights(config.device):
            core = load_engine(config).core
        if model_runner(core.runner).device.type == "cpu":
            follow_gpu_ways(core, config)
        return core


def step_bytes(core: EngineCore, model: str, context: int, batch: int) -> int:
    """Return the bytes that a decode step must read: all weights, and the KV of its sequences."""
    kv = model_runner(core.runner).kv
    per_token = (
        sum(part.nbytes for layer in kv for part in layer.parts) // kv[0].key[..., 0, 0].numel()
    )
    return linear_weights(model) * kv[0].dtype.itemsize + batch * (context + 1) * per_token


def batch_ms(bench: Workbench, batch: ProfileBatch, repeats: int) -> float:
    """Return the median milliseconds of the runner alone, sampling included."""
    bench.time(batch)  # kernels are compiled, libraries choose their algorithms
    return statistics.median(bench.time(batch) for _ in range(repeats)) * 1e3


def measure_runner(
    core: EngineCore, model: str, effort: EngineEffort, copy_gb_s: float | None
) -> dict[str, Any]:
    """Measure decode steps beside their floor, drawing with top_p, drafts, mixed batches, chunks."""
    bench = Workbench(core, 0, GREEDY)
    decodes = []
    for size in effort.batches:
        ms = batch_ms(bench, ProfileBatch(decodes=(effort.context,) * size), effort.repeats)
        row = {"batch": size, "ms": round(ms, 3)}
        if copy_gb_s is not None:
            floor = step_bytes(core, model, effort.context, size) / copy_gb_s / 1e6
            row |= {"floor_ms": round(floor, 3), "ratio": round(ms / floor, 3)}
        decodes.append(row)
    num_decodes = effort.mixed[0][0]
    drawn = {
        name: round(
            batch_ms(
                Workbench(core, 0, params),
                ProfileBatch(decodes=(effort.context,) * num_decodes),
                effort.repeats,
            ),
            3,
        )
        for name, params in (("greedy_ms", GREEDY), ("top_p_ms", NUCLEUS))
    }
    mixed = []
    graphs = model_runner(core.runner).graphs
    for decoding, chunk in effort.mixed:
        batch = ProfileBatch(
            decodes=(effort.context,) * decoding,
            chunks=((0, chunk),),
            graphs=graphs is not None,
            mixed=NO_MIXED if graphs is None else graphs.mixed,
        )
        ms = batch_ms(bench, batch, effort.repeats)
        is_graph = graphs is not None and not batch.shape.eager
        mixed.append({"decodes": decoding, "chunk": chunk, "graph": is_graph, "ms": round(ms, 3)})
    prefills = []
    for size in effort.chunks:
        ms = batch_ms(bench, ProfileBatch(chunks=((0, size),)), effort.repeats)
        prefills.append({"tokens": size, "ms": round(ms, 3), "tokens_s": round(size / ms * 1e3)})
    return {
        "decode": decodes,
        "drawn": {"batch": num_decodes, **drawn},
        "verification": {
            "batch": num_decodes,
            "drafted": effort.drafted,
            "ms": round(verification_ms(bench, num_decodes, effort), 3),
        },
        "mixed": mixed,
        "prefill": prefills,
    }


def verification_ms(bench: Workbench, batch: int, effort: EngineEffort) -> float:
    """Return the median milliseconds of verifying drafts of some sequences."""
    drafts = Proposal(tuple(range(effort.drafted)))
    shape = ProfileBatch(decodes=(effort.context,) * batch)
    bench.time(shape, drafts)
    return statistics.median(bench.time(shape, drafts) for _ in range(effort.repeats)) * 1e3


def memory_of(core: EngineCore) -> dict[str, Any]:
    """Return what is free on the device in GiB, and the most that torch ever reserved."""
    blocks = core.pool.num_blocks
    if model_runner(core.runner).device.type != "cuda":
        return {"kv_blocks": blocks, "free_gib": None, "peak_reserved_gib": None}
    free, total = torch.cuda.mem_get_info()
    return {
        "kv_blocks": blocks,
        "free_gib": round(free / GIB, 3),
        "total_gib": round(total / GIB, 3),
        "reserved_gib": round(torch.cuda.memory_reserved() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
    }


def measure_engine(core: EngineCore, effort: EngineEffort) -> dict[str, Any]:
    """Measure iterations of the whole engine, beside the same batches of the runner alone.

    ``overhead_ms`` is the time of an iteration beyond the runner's batch. Planning is hidden
    if that is less than the time of a plan. ``idle`` is for how long the device waited for the host,
    with each batch launched behind the one that runs, and with the order in which that has ended.
    """
    # Random weights repeat themselves, so drafts would come true: sequences would end early, and a
    # batch with drafts is not launched ahead.
    proposer, core.proposer = core.proposer, None
    num_seqs, num_steps = effort.engine
    rng, vocab = random.Random(0), model_runner(core.runner).model.shape.vocab_size
    for i in range(num_seqs):
        request = Request(
            request_id=f"bench-{i}",
            prompt_token_ids=tuple(rng.choices(range(vocab), k=effort.context)),
            # A sequence whose prompt runs early decodes until the last prompt has run.
            params=replace(
                GREEDY, max_tokens=2 * num_steps + num_seqs + TRACED_STEPS + 2, ignore_eos=True
            ),
            seed=0,
            arrival_s=core.clock(),
        )
        core.add(Sequence(request), None)
    started = time.perf_counter()
    while not all(seq.is_decoding for seq in core.running) or core.waiting:
        core.step()
    prefill_s = time.perf_counter() - started
    plans, before = core.stats.planning_s, core.stats.planning_s.copy()
    times, idle = timed_steps(core, num_steps)
    num_plans = sum(plans.counts) - sum(before.counts)
    trace = trace_steps(core.step, TRACED_STEPS)
    context = core.running[0].num_computed_tokens
    core.end()
    launches_ahead, core.launches_ahead = core.launches_ahead, False
    _, idle_after = timed_steps(core, num_steps)
    core.launches_ahead = launches_ahead
    for i in range(num_seqs):
        core.abort(f"bench-{i}")
    core.drain()
    core.proposer = proposer
    runner_ms = batch_ms(
        Workbench(core, 1, GREEDY), ProfileBatch(decodes=(context,) * num_seqs), effort.repeats
    )
    iteration_ms = statistics.median(times) * 1e3
    return {
        "seqs": num_seqs,
        "prefill_tokens_s": round(num_seqs * effort.context / prefill_s),
        "iteration_ms": round(iteration_ms, 3),
        "runner_ms": round(runner_ms, 3),
        "overhead_ms": round(iteration_ms - runner_ms, 3),
        "planning_ms": round((plans.total - before.total) / max(1, num_plans) * 1e3, 3),
        "plans_ahead": dict(core.stats.plans_ahead),
        "trace": trace,
        "idle": {"behind": idle if launches_ahead else None, "after": idle_after},
        "decode_tokens_s": round(num_seqs / iteration_ms * 1e3),
    }


def timed_steps(core: EngineCore, num_steps: int) -> tuple[list[float], dict[str, float]]:
    """Return the seconds of each step, and for how long the device was idle in all of them."""
    meter, times = IdleMeter(model_runner(core.runner)), []
    with meter.measuring():
        for _ in range(num_steps):
            started = time.perf_counter()
            core.step()
            times.append(time.perf_counter() - started)
    idle_s, whole_s = meter.seconds()
    return times, {
        "ms": round(idle_s / num_steps * 1e3, 3),
        "share": round(idle_s / max(whole_s, 1e-9), 4),
    }


def measure_model(
    model: str, effort: EngineEffort, copy_gb_s: float | None, profile_s: float, graphs: bool
) -> dict[str, Any]:
    """Measure one model on an engine with or without CUDA graphs.

    Args:
        profile_s: seconds for profiling; 0 for no profile.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    core = load(model, {**effort.settings, "cuda_graphs": graphs})
    start_s, after_start = time.perf_counter() - started, memory_of(core)
    runner = model_runner(core.runner)
    recorded = runner.graphs
    result = {
        "model": model,
        "cuda_graphs": graphs,
        "backend": runner.backend.name,
        "start_s": round(start_s, 1),
        "graphs": None if recorded is None else recorded.num_recorded,
        "mixed_graphs": None if recorded is None else list(recorded.mixed),
        **measure_runner(core, model, effort, copy_gb_s),
        "engine": measure_engine(core, effort),
    }
    result["memory"] = {"after_start": after_start, "after_run": memory_of(core)}
    if profile_s:
        profile = profile_core(core, model, seconds=profile_s)
        quality = profile.quality
        result["profile"] = {
            "r2": round(quality.r2, 4),
            "p50_error": round(quality.p50_error, 4),
            "p90_error": round(quality.p90_error, 4),
            "margin": round(profile.model.margin, 3),
            "batches": len(profile.samples),
            "seconds": round(profile.seconds, 1),
            "pieces": [asdict(piece) for piece in profile.model.pieces],
            # Each: tokens, sequences, context tokens, attention pairs, eager or not, milliseconds.
            "samples": [
                [
                    s.shape.tokens,
                    s.shape.seqs,
                    s.shape.context_tokens,
                    s.shape.attention_pairs,
                    s.shape.eager,
                    round(s.seconds * 1e3, 3),
                ]
                for s in profile.samples
            ],
        }
    return result


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield one model's results as lines of text."""
    graphs = "CUDA graphs" if result["cuda_graphs"] else "no CUDA graphs"
    yield f"{result['model']} ({result['backend']}, {graphs})"
    for row in result["decode"]:
        floor = f", floor {row['floor_ms']:.2f}, x{row['ratio']:.2f}" if "ratio" in row else ""
        yield f"  decode of {row['batch']:>3}: {row['ms']:8.2f} ms{floor}"
    drawn = result["drawn"]
    yield (
        f"  decode of {drawn['batch']:>3}, greedy {drawn['greedy_ms']:.2f} ms, with top_p "
        f"{drawn['top_p_ms']:.2f}"
    )
    drafts = result["verification"]
    yield f"  {drafts['batch']} verifications of {drafts['drafted']} drafts: {drafts['ms']:.2f} ms"
    for row in result["mixed"]:
        words = "a graph" if row["graph"] else "eager"
        yield (
            f"  {row['decodes']} decodes and {row['chunk']} tokens of prefill, {words}: "
            f"{row['ms']:.2f} ms"
        )
    for row in result["prefill"]:
        yield f"  prefill of {row['tokens']}: {row['ms']:.2f} ms, {row['tokens_s']} tokens/s"
    engine = result["engine"]
    yield (
        f"  iteration of {engine['seqs']} decodes: {engine['iteration_ms']:.2f} ms, the runner "
        f"alone {engine['runner_ms']:.2f}, a plan {engine['planning_ms']:.3f}"
    )
    if engine["trace"]["busy_share"] is not None:
        yield f"    idle for {1 - engine['trace']['busy_share']:.1%} of five traced ones"
    for order, idle in engine["idle"].items():
        if idle is not None:
            yield f"    launched {order} the one before: idle for {idle['share']:.1%} of the time"
    if "profile" in result:
        profile = result["profile"]
        yield f"  planner's predictions: R2 {profile['r2']}, p90 error {profile['p90_error']:.1%}"


def summary(results: list[dict[str, Any]], copy_gb_s: float | None) -> dict[str, Any]:
    """Return the last line. Figures that were not measured are null."""
    ratios = [
        row["ratio"]
        for result in results
        for row in result["decode"]
        if (result["model"], row["batch"]) == (GOAL_MODEL, GOAL_BATCH)
        and result["cuda_graphs"]
        and "ratio" in row
    ]
    r2 = {result["model"]: result["profile"]["r2"] for result in results if "profile" in result}
    return {
        "copy_gb_s": copy_gb_s,
        "decode_ratio_opt_6.7b_b64": min(ratios, default=None),
        "r2": r2,
        "goals_met": min(ratios) <= GOAL_RATIO and min(r2.values()) >= GOAL_R2
        if ratios and r2
        else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--profile-seconds", type=float, default=20.0, help="0: no profile")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append results, as JSON lines")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, in the interpreter")
    args = parser.parse_args()
    choose_interpreter(args.dry)
    if not args.dry and not torch.cuda.is_available():
        print("no CUDA device here; try --dry", file=sys.stderr)
        return 2
    effort, words = DRY if args.dry else FULL, gpu_machine()
    copy_gb_s = None if args.dry else round(measure_ceilings(rep_ms=200.0).copy_gb_s, 1)
    results: list[dict[str, Any]] = []
    failures = FailureLog()
    # With graphs: this is how minserve serves, and it is what is profiled.
    variants = [True] if args.dry else [True, False]
    runs = [(model, graphs) for graphs in variants for model in args.model or effort.models]
    for model, graphs in progress_bar(runs, unit="engine", desc="Measuring"):
        seconds = args.profile_seconds if graphs == variants[0] else 0.0
        try:
            with gpu_ways() if args.dry else nullcontext():
                result = measure_model(model, effort, copy_gb_s, seconds, graphs)
        except Exception as error:  # a model that does not fit must not hide the others
            failures.add(f"{model}{'' if graphs else ' without graphs'}", error)
            continue
        results.append({**result, **words, "dry": args.dry})
        tqdm.write("\n".join(lines(result)))
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    told = {**words, **summary(results, copy_gb_s), "failures": failures.lines, "dry": args.dry}
    print(json.dumps(told))
    return 1 if failures.lines else 0


if __name__ == "__main__":
    sys.exit(main())
