"""A batch that fails costs its culprit an error, and nobody else a token."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minserve import Engine, SamplingParams
from minserve.engine.batch import Scheduled
from minserve.engine.recovery import SHORTEST_CHUNK, is_out_of_memory
from minserve.engine.sampling.sampler import Sampler
from minserve.errors import GenerationError
from minserve.outputs import OutputDelta

SETTINGS = {"dtype": "float32", "threads": 1, "token_budget": 256, "max_num_seqs": 16, "num_blocks": 120,
            "block_size": 8, "policy": "sarathi"}  # fmt: skip
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
POISON = 3
PROMPTS = [[5 + i, 6, 7 + i] for i in range(11)]


@pytest.fixture
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(str(tiny_llama_dir), **SETTINGS)


def undisturbed(engine: Engine, prompts: list[list[int]], params: Any = PARAMS) -> list[list[int]]:
    found = [engine.generate([one], params)[0].outputs[0].token_ids for one in prompts]
    core = engine._core
    fresh = type(core.pool)(core.pool.num_blocks, core.pool.block_size)  # nothing cached
    core.pool = core._applier._pool = fresh
    return found


def together(
    engine: Engine, prompts: list[list[int]], params: SamplingParams = PARAMS
) -> list[list[OutputDelta]]:
    """Return the deltas of each prompt, all run at once."""
    ids = []
    for prompt in prompts:
        submission = engine._prepare(prompt, params)
        engine._enqueue(submission)
        ids.append(submission.request.request_id)
    told: dict[str, list[OutputDelta]] = {one: [] for one in ids}
    while engine._core.has_work:
        for delta in engine._core.step():
            told[delta.request_id].append(delta)
    engine._core.check_integrity()
    return [told[one] for one in ids]


def tokens(deltas: list[OutputDelta]) -> list[int]:
    assert deltas[-1].error is None
    return [token for delta in deltas for token in delta.token_ids]


def fails_alone(deltas: list[OutputDelta], words: str) -> None:
    assert isinstance(deltas[-1].error, GenerationError)
    assert words in str(deltas[-1].error)


def break_launches(
    engine: Engine,
    patch: pytest.MonkeyPatch,
    is_bad: Callable[[list[Scheduled]], bool],
    error: Exception,
    at: str = "launch",
) -> list[int]:
    """Fail for some batches; return where the size of each launched one is noted."""
    launch, sizes = engine._core.runner.launch, []

    def raising() -> Any:
        raise error

    def launching(batch: list[Scheduled]) -> Any:
        sizes.append(len(batch))
        bad = is_bad(batch)
        if bad and at == "launch":
            raising()
        flight = launch(batch)
        if bad:
            patch.setattr(flight, "results", raising)
        return flight

    patch.setattr(engine._core.runner, "launch", launching)
    return sizes


def has_poison(batch: list[Scheduled]) -> bool:
    return any(POISON in item.seq.token_ids[:1] for item in batch)


@pytest.mark.parametrize("at", ["launch", "results"])
def test_the_culprit_is_found_by_halves(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    expected = undisturbed(engine, PROMPTS)
    sizes = break_launches(engine, monkeypatch, has_poison, RuntimeError("it fell over"), at)
    *good, bad = together(engine, [*PROMPTS, [POISON, 4]])
    fails_alone(bad, "it fell over")
    assert [tokens(one) for one in good] == expected
    # The batch of 12, then two parts at each depth; each later iteration is one launch.
    assert sizes[0] == 12
    assert len(sizes) <= 1 + 2 * math.ceil(math.log2(12)) + PARAMS.max_tokens
    assert engine._core.stats.failed_batches == {"error": 1, "out_of_memory": 0}


def test_all_that_fail_end_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(engine, PROMPTS)
    with monkeypatch.context() as patch:
        sizes = break_launches(engine, patch, lambda _: True, RuntimeError("it fell over"))
        for deltas in together(engine, PROMPTS):
            fails_alone(deltas, "it fell over")
        assert len(sizes) <= 2 * len(PROMPTS)
    assert [tokens(one) for one in together(engine, PROMPTS)] == expected


def test_a_row_that_the_sampler_cannot_take_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(engine, PROMPTS)
    launch = Sampler.launch

    def launching(self: Sampler, logits: Any, seqs: list, proposals: list) -> Any:
        if any(seq.token_ids[0] == POISON and seq.num_output_tokens == 2 for seq in seqs):
            raise ValueError("no such row")
        return launch(self, logits, seqs, proposals)

    monkeypatch.setattr(Sampler, "launch", launching)
    bad, *good = together(engine, [[POISON, 4], *PROMPTS])
    fails_alone(bad, "no such row")
    assert sum(len(delta.token_ids) for delta in bad) == 2
    assert [tokens(one) for one in good] == expected


def test_what_fails_with_drafts_goes_on_without(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "policy": "dp", "speculator": "ngram"}
    engine = Engine(str(tiny_llama_dir), **settings)
    engine.profile(0.5)
    prompt, params = [5, 6, 7] * 20, replace(PARAMS, max_tokens=40)
    expected = undisturbed(engine, [prompt], params)
    before = engine.speculation_stats.num_accepted_tokens
    assert before > 0
    num_drafts = 0

    def drafts(batch: list[Scheduled]) -> bool:
        nonlocal num_drafts
        drafted = any(item.proposal is not None for item in batch)
        num_drafts += drafted
        return drafted

    break_launches(engine, monkeypatch, drafts, RuntimeError("too long"))
    assert [tokens(one) for one in together(engine, [prompt], params)] == expected
    assert num_drafts > 0
    assert engine.speculation_stats.num_accepted_tokens == before


# -- memory that runs out ----------------------------------------------------------------

ERRORS = [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def test_memory_that_ran_out_is_known_by_its_errors() -> None:
    assert all(map(is_out_of_memory, ERRORS))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def larger_than(limit: int) -> Callable[[list[Scheduled]], bool]:
    return lambda batch: sum(item.num_tokens for item in batch) > limit


@pytest.mark.parametrize(
    ("error", "limit"),
    [*((error, 40) for error in ERRORS), (ERRORS[0], 95), (ERRORS[0], SHORTEST_CHUNK)],
)
def test_what_does_not_fit_into_memory_runs_in_smaller_parts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception, limit: int
) -> None:
    prompts = [*PROMPTS[:3], [(7 * i) % 400 + 5 for i in range(90)]]
    params = replace(PARAMS, prompt_logprobs=1)
    (alone,) = engine.generate([prompts[-1]], params)
    expected = undisturbed(engine, prompts)
    break_launches(engine, monkeypatch, larger_than(limit), error)
    told = together(engine, prompts, params)
    assert [tokens(one) for one in told] == expected
    found = told[-1][0].prompt_logprobs
    assert found is not None
    assert alone.prompt_logprobs is not None
    for one, wanted in zip(found[1:], alone.prompt_logprobs[1:], strict=True):
        assert one is not None
        assert wanted is not None
        assert one.token_id == wanted.token_id
        assert one.logprob == pytest.approx(wanted.logprob, abs=1e-4)
    assert engine._core.stats.failed_batches["out_of_memory"] == 1


def test_a_request_that_needs_more_memory_than_there_is_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(engine, PROMPTS)
    break_launches(engine, monkeypatch, has_poison, MemoryError())
    *good, bad = together(engine, [*PROMPTS, [POISON, *range(4, 90)]])
    fails_alone(bad, "MemoryError")
    assert [tokens(one) for one in good] == expected


def test_a_failed_pass_holds_no_memory_while_its_parts_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(engine, PROMPTS)
    launch, held = engine._core.runner.launch, []

    def launching(batch: list[Scheduled]) -> Any:
        assert all(tensor() is None for tensor in held)
        if len(batch) > 4:
            activations = torch.empty(1000)
            held.append(weakref.ref(activations))
            raise MemoryError
        return launch(batch)

    monkeypatch.setattr(engine._core.runner, "launch", launching)
    gc.disable()  # what only a collection would free is held
    try:
        assert [tokens(one) for one in together(engine, PROMPTS)] == expected
    finally:
        gc.enable()
    assert len(held) > 2


# -- NaN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_wrong_numbers_of_one_request_stay_its_own(engine: Engine, value: float) -> None:
    """While it runs, in the blocks that it leaves behind, and in the prefixes that stay cached."""
    poisoned = [(7 * i) % 400 + 5 for i in range(27)]
    prompts = [*PROMPTS, poisoned]
    params = replace(PARAMS, max_tokens=30)
    expected = undisturbed(engine, prompts, params)
    core, told = engine._core, {}
    ids = []
    for prompt in [poisoned, *PROMPTS]:  # it gets block 0, with which others are padded
        submission = engine._prepare(prompt, params)
        engine._enqueue(submission)
        ids.append(submission.request.request_id)
        told[ids[-1]] = []
    deltas = core.step()
    (seq,) = core.table.of_request(ids[0])
    table = seq.seq.block_table
    assert 0 in table
    for layer in core.runner.kv:
        layer.key[table] = value
        layer.value[table] = value
    while core.has_work:
        for delta in deltas:
            told[delta.request_id].append(delta)
        deltas = core.step()
    for delta in deltas:
        told[delta.request_id].append(delta)
    bad, *good = told.values()
    fails_alone(bad, "contain NaN")
    assert [tokens(one) for one in good] == expected[:-1]
    # The same prompt again, beside others: nothing of it was kept, and its blocks do no harm.
    assert [tokens(one) for one in together(engine, prompts, params)] == expected
