"""Profiles of a device that has CUDA graphs of decodes: what is measured, and how well it fits.

Times are those of a synthetic H100; where a core runs, it is a tiny one whose graphs do their
work again.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from padded_backend import PaddedBackend, Rerun
from speculating import DEVICE

from minserve import Engine, SamplingParams
from minserve.engine.core import EngineCore
from minserve.engine.device.graph_recording import limits_of, record_all
from minserve.engine.device.mixed_graphs import mixed_limit, mixed_sizes
from minserve.engine.profile.profile_cache import profile_key
from minserve.engine.profile.profile_design import CoreLimits, design
from minserve.engine.profile.profiler import NUM_BATCHES, draft_costs, profile_core
from minserve.engine.profile.workbench import Workbench
from minserve.planner.plan import IterationPlan
from minserve.planner.predict.eager import MixedLimit
from minserve.planner.predict.perf_fit import FitQuality, ProfileSample, evaluate, fit
from minserve.planner.predict.perf_model import BatchShape, PerfModel

# Bytes and operations per second that kernels reach; seconds in which the host launches one of
# them (Python between them included), and a graph; log-standard deviation of times.
BANDWIDTH, FLOPS, LAUNCH_S, REPLAY_S = 3.0e12, 5.0e14, 2e-5, 1.5e-4
KERNELS_PER_LAYER = 14
NOISE = 0.03
GPU = CoreLimits(
    token_budget=8192, max_num_seqs=256, longest=8192, num_blocks=8000, block_size=16, graphs=True
)


@dataclass(frozen=True)
class Model:
    """Of a size: parameters, layers, bytes of one token's keys and values, and width."""

    parameters: float
    layers: int
    kv_bytes: float
    hidden_size: int

    def seconds(self, shape: BatchShape) -> float:
        """The device reads the weights and the KV, or computes; an eager pass takes at least as
        long as the host needs to launch its kernels.
        """
        reads_s = (2 * self.parameters + self.kv_bytes * shape.context_tokens) / BANDWIDTH
        # Two operations for each parameter; attention's are by its width, kv_bytes / 4 at least.
        works = 2 * self.parameters * shape.tokens + self.kv_bytes * shape.attention_pairs
        device_s = max(reads_s, works / FLOPS) + REPLAY_S
        return (
            max(device_s, LAUNCH_S * KERNELS_PER_LAYER * self.layers) if shape.eager else device_s
        )


SIZES = {
    "135M": Model(1.35e8, 30, 2 * 2 * 30 * 192, 576),
    "1B": Model(1.24e9, 16, 2 * 2 * 16 * 512, 2048),
    "8B": Model(8.0e9, 32, 2 * 2 * 32 * 1024, 4096),
}


SOME_MIXED = MixedLimit(max_tokens=24, max_chunks=2)


def quality(samples: list[ProfileSample]) -> FitQuality:
    """On a quarter that the fit has not seen, as a profile tells it."""
    unseen, seen = samples[::4], [s for i, s in enumerate(samples) if i % 4]
    return evaluate(fit(seen), unseen)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_small_models_are_predicted_by_who_is_eager_and_large_ones_either_way(
    size: str, seed: int
) -> None:
    rng, shapes = random.Random(seed), [one.shape for one in design(GPU, NUM_BATCHES, seed)]
    rng.shuffle(shapes)
    times = [SIZES[size].seconds(one) * rng.lognormvariate(0.0, NOISE) for one in shapes]
    known = list(map(ProfileSample, shapes, times))
    told = quality(known)
    untold = quality([ProfileSample(replace(one.shape, eager=0), one.seconds) for one in known])
    assert told.r2 >= 0.95
    assert told.mape < 0.06
    if size == "8B":
        assert untold.r2 >= 0.95
    else:
        assert untold.mape > 4 * told.mape
    if size == "135M":
        assert untold.r2 < 0.0, "worse than the mean of all times"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_all_sizes_are_predicted_where_small_batches_with_prefills_are_graphs_too(
    size: str, seed: int
) -> None:
    """A graph computes for its padding as well."""
    model, rng = SIZES[size], random.Random(seed)
    mixed = mixed_limit(model.hidden_size, GPU.token_budget, GPU.max_num_seqs)
    samples = []
    for batch in design(replace(GPU, mixed=mixed), NUM_BATCHES, seed):
        shape = batch.shape
        padded = shape
        if batch.chunks and not shape.eager:
            sizes = mixed_sizes(mixed.max_tokens)
            padded = replace(shape, tokens=sizes[bisect_left(sizes, shape.tokens)])
        seconds = model.seconds(padded) * rng.lognormvariate(0.0, NOISE)
        samples.append(ProfileSample(shape, seconds))
    rng.shuffle(samples)
    assert {one.shape.eager for one in samples} == {0, 1}
    found = quality(samples)
    assert found.r2 >= 0.95
    assert found.mape < 0.08


def with_graphs(engine: Engine, mixed: MixedLimit = SOME_MIXED) -> EngineCore:
    """An engine on a CPU with what loading would record on a GPU."""
    core = engine._core
    shape = core.runner.model.shape
    core.runner.backend = PaddedBackend(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale
    )
    max_queries = 1 if core.proposer is None else 1 + core.proposer.max_tokens
    limits = limits_of(engine.config, {core.runner: max_queries}, engine.max_model_len)
    limits = {one: replace(own, mixed=mixed) for one, own in limits.items()}
    record_all(limits, Rerun())
    return core


def watched(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every pass that the runner makes from now on, whether it was an eager one."""
    seen: list[bool] = []
    forward, run = core.runner.forward, core.runner._run

    def eager(*args: Any) -> torch.Tensor:
        seen[-1] = True
        return run(*args)

    def noted(*args: Any) -> torch.Tensor:
        seen.append(False)
        return forward(*args)

    monkeypatch.setattr(core.runner, "_run", eager)
    monkeypatch.setattr(core.runner, "forward", noted)
    return seen


SETTINGS = {"device": "cpu", "dtype": "float32", "threads": 1, "token_budget": 48, "max_num_seqs": 6,
            "num_blocks": 60, "block_size": 8}  # fmt: skip


def test_a_profile_says_of_every_batch_whether_it_was_replayed(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(str(tiny_llama_dir), max_model_len=100, **SETTINGS)
    plain = profile_key(engine._core, "tiny")
    core = with_graphs(engine)
    assert profile_key(core, "tiny") != plain
    batches, seen = design(CoreLimits.of(core), 40, seed=0), watched(core, monkeypatch)
    assert {bool(one.chunks) for one in batches if not one.shape.eager} == {True, False}
    bench = Workbench(core, seed=0)
    for batch in batches:
        bench.time(batch)
    assert seen == [bool(batch.shape.eager) for batch in batches]
    assert set(seen) == {True, False}


@pytest.mark.parametrize("graphs", [False, True])
def test_nothing_longer_than_what_is_served_is_measured(tiny_llama_dir: Path, graphs: bool) -> None:
    engine = Engine(str(tiny_llama_dir), max_model_len=100, **SETTINGS)
    core = with_graphs(engine) if graphs else engine._core
    batches = design(CoreLimits.of(core), NUM_BATCHES, seed=0)
    longest = max(start + num_tokens for batch in batches for start, num_tokens in batch.runs)
    assert 90 < longest <= 100


def test_a_device_without_graphs_has_no_eager_batches(tiny_llama_dir: Path) -> None:
    core = Engine(str(tiny_llama_dir), **SETTINGS)._core
    profile = profile_core(core, "tiny", seconds=0.5)
    assert not any(shape.eager for shape in profile.runs)
    assert not any(piece.eager for piece in profile.model.pieces)


@pytest.mark.parametrize(
    ("policy", "speculator", "ahead"),
    [
        ("dp", "off", False),
        ("dp", "ngram", True),
        ("sarathi", "ngram", False),
        ("fcfs", "off", True),
    ],
)
def test_every_plan_says_whether_its_batch_is_replayed(
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    speculator: str,
    ahead: bool,
) -> None:
    """With too few blocks, so that sequences are preempted and come back to cached prefixes."""
    settings = {**SETTINGS, "num_blocks": 26, "max_model_len": 100, "max_speculation": 3}
    engine = Engine(str(tiny_llama_dir), policy=policy, speculator=speculator, **settings)
    core = with_graphs(engine)
    core.planner.model, core.plans_ahead = PerfModel(DEVICE, mixed=SOME_MIXED), ahead
    seen, planned = watched(core, monkeypatch), []
    observe = core.planner.observe

    def noted(plan: IterationPlan, seconds: float) -> None:
        planned.append(bool(plan.shape.eager))
        observe(plan, seconds)

    monkeypatch.setattr(core.planner, "observe", noted)
    rng = random.Random(0)
    prompts = [[7, 8, 9] * 5 + rng.choices(range(5, 9), k=rng.randint(1, 30)) for _ in range(12)]
    engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    assert seen == planned
    assert set(seen) == {True, False}
    assert core.planner.num_preemptions > 0


def test_the_costs_of_drafts_are_told_apart_from_those_of_eager_passes() -> None:
    """On times of a synthetic GPU whose first pass, where many catch up, is no graph."""
    rng, truth = random.Random(0), (1.2e-3, 4e-6, 6e-3)
    rows = [
        (steps, tokens, eager)
        for num_seqs in (1, 4, 16, 32)
        for steps in (1, 4)
        for tokens, eager in (
            (num_seqs * (48 + steps), int(num_seqs > 16)),
            (num_seqs * steps, 0),
        )
    ]
    times = [
        sum(cost * number for cost, number in zip(truth, row, strict=True))
        * rng.lognormvariate(0.0, NOISE)
        for row in rows
    ]
    assert draft_costs(rows, times) == pytest.approx(truth, rel=0.1)
    without = [(steps, tokens, 0) for steps, tokens, _ in rows]
    assert draft_costs(without, times)[1] > 1.2 * truth[1], "tokens would pay for it"
