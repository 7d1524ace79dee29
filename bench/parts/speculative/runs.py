"""Paired runs with and without drafts for `speculative.py`, and the lossless check."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from minserve import Engine, SamplingParams
from minserve.engine.profile.profile_cache import Profile
from minserve.engine.profile.profiler import measure_drafting
from minserve.engine.speculation.proposer import NgramProposer, Proposer
from parts.speculative.report import (
    CaseResult,
    Counts,
    SpeculationCell,
    Tally,
    first_difference,
    pooled,
)

# Blocks that the largest batch of the longest prompts needs.
NUM_BLOCKS = 320
WARM_UP = 16
CHECK_LENGTH, CHECK_TEMPERATURE = 4, 0.8


@dataclass(frozen=True, slots=True)
class SpeculationCase:
    """A line of the table.

    Attributes:
        group: the cases of a group share their engines.
        prompts: name of a set in minserve/workload/data.
        instruction: the request to the model, with ``{text}`` for the prompt.
    """

    name: str
    group: str
    speculator: str
    prompts: str = ""
    instruction: str = "{text}"
    in_quick: bool = True


@dataclass(frozen=True, slots=True)
class SpeculationEffort:
    """The amount of measurement.

    Attributes:
        rounds: number of rounds for each batch size.
        lone_prompts: prompts that are run one by one at batch size 1.
        tokens: tokens of each output.
        profile_s: seconds for the device's profile.
        check_prompts, check_tokens: prompts of the lossless check, and tokens of each output in it.
    """

    rounds: dict[int, int]
    lone_prompts: int
    tokens: int
    profile_s: float
    check_prompts: int
    check_tokens: int


@dataclass(slots=True)
class Group:
    """The engines of one target model, made when first needed.

    Attributes:
        target, draft: folders or names for `Engine`.
        load: makes an engine from settings.
        profile_s: seconds for the first profile; further engines share it.
    """

    target: str
    draft: str | None
    profile_s: float
    load: Callable[..., Engine] = Engine
    profile: Profile | None = None
    _engines: dict[tuple[Any, ...], Engine] = field(default_factory=dict)

    def engine(self, speculator: str, fixed: int | None, **settings: Any) -> Engine:
        """Return a profiled engine; ``fixed`` is the speculation length, ``None`` for adaptive."""
        key = (speculator, fixed)
        if key not in self._engines:
            engine = self.new(speculator, fixed, **settings)
            if self.profile is None:
                self.profile = engine.profile(self.profile_s)
            else:
                # A profile of a busy machine is not kept in the cache, and would take its time
                # again for every engine. All engines of a group must use the same profile.
                model = self.profile.new_model()
                costs = measure_drafting(engine._core)
                engine._core.planner.model = model.with_draft_costs(*costs)
            self._engines[key] = engine
        return self._engines[key]

    def new(self, speculator: str, fixed: int | None, **settings: Any) -> Engine:
        """Return a new engine, which is not shared."""
        if speculator == "draft":
            settings["draft_model"] = self.draft
        if fixed is not None:
            settings |= {"policy": "sarathi", "max_speculation": fixed}
        return self.load(
            self.target,
            speculator=speculator,
            prefix_caching=False,
            num_blocks=NUM_BLOCKS,
            seed=0,
            **settings,
        )


def run(
    engine: Engine, prompts: list[Any], tokens: int, seed: int = 0
) -> tuple[Counts, list[list[int]]]:
    """Run prompts together; returns counts of the decode phase, and the outputs' token ids.

    Args:
        tokens: tokens of each output.
        seed: greedy outputs do not depend on it, but acceptance by chance does.
    """
    core = engine._core
    params = [
        SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=seed + i)
        for i in range(len(prompts))
    ]
    submissions = [
        engine._prepare(prompt, one) for prompt, one in zip(prompts, params, strict=True)
    ]
    outputs: dict[str, list[int]] = {one.request.request_id: [] for one in submissions}
    for one in submissions:
        engine._enqueue(one)
    try:
        _prefill(engine, outputs)
        counts = _decode(engine, outputs)
    finally:
        for request_id in outputs:
            core.abort(request_id)
    return counts, list(outputs.values())


def _prefill(engine: Engine, outputs: dict[str, list[int]]) -> None:
    """Compute the first token of each prompt, all in one batch if the cache allows.

    Without a performance model the planner fills the budget, and without a proposer no sequence
    gets ahead of the others.
    """
    core = engine._core
    kept = core.token_budget, core.planner.model, core.proposer
    core.token_budget = max(core.token_budget, sum(seq.num_tokens for seq in core.waiting))
    core.planner.model = core.proposer = None
    try:
        while not all(outputs.values()):
            _take(core.step(), outputs)
    finally:
        core.token_budget, core.planner.model, core.proposer = kept


def _decode(engine: Engine, outputs: dict[str, list[int]]) -> Counts:
    """Run and time all tokens after the first ones."""
    core = engine._core
    core.stats.speculation = tally = Tally()
    tokens = passes = iterations = speculated = 0
    started = time.perf_counter()
    while core.has_work:
        before = tally.num_drafts
        deltas = core.step()
        iterations += 1
        speculated += tally.num_drafts > before
        passes += len(deltas)
        tokens += _take(deltas, outputs)
    return Counts(
        tokens=tokens,
        seconds=time.perf_counter() - started,
        passes=passes,
        iterations=iterations,
        speculated=speculated,
        num_drafts=tally.num_drafts,
        drafted=tuple(tally.num_drafted_per_pos),
        accepted=tuple(tally.num_accepted_per_pos),
    )


def _take(deltas: list[Any], outputs: dict[str, list[int]]) -> int:
    """Note new tokens, and return their number."""
    for delta in deltas:
        if delta.error is not None:
            raise delta.error
        outputs[delta.request_id].extend(delta.token_ids)
    return sum(len(delta.token_ids) for delta in deltas)


def measure(
    with_: Engine, without: Engine, groups: list[list[Any]], rounds: int, tokens: int,
    tick: Callable[[], None], lengths: str,
) -> SpeculationCell:  # fmt: skip
    """Run rounds over groups of prompts, each with both engines, which take turns to begin."""
    pairs, same, total = [], 0, 0
    for engine in (with_, without):
        run(engine, groups[0], min(WARM_UP, tokens))
    for turn in range(rounds):
        sums: dict[bool, list[Counts]] = {True: [], False: []}
        for place, prompts in enumerate(groups):
            seed = 1000 * (turn * len(groups) + place)
            first = (turn + place) % 2 == 0
            outputs = {}
            for speculates in (first, not first):
                counts, outputs[speculates] = run(
                    with_ if speculates else without, prompts, tokens, seed
                )
                sums[speculates].append(counts)
                tick()
            same += sum(a == b for a, b in zip(outputs[True], outputs[False], strict=True))
            total += len(prompts)
        pairs.append((pooled(sums[True]), pooled(sums[False])))
    return SpeculationCell(
        batch=len(groups[0]), lengths=lengths, pairs=pairs, identical=same / total
    )


def check_lossless(
    group: Group, prompts: dict[str, list[Any]], cases: Sequence[SpeculationCase], effort: SpeculationEffort,
    results: dict[str, CaseResult], **settings: Any,
) -> None:  # fmt: skip
    """Compare float32 outputs with those without speculation, and note it in the results.

    One engine makes both outputs, so that only the proposals differ.
    """
    drafts = any(case.speculator == "draft" for case in cases)
    settings["dtype"] = "float32"
    engine = group.new("draft" if drafts else "ngram", CHECK_LENGTH, **settings)
    core = engine._core
    proposers: dict[str, Proposer] = {"ngram": NgramProposer(CHECK_LENGTH)}
    if drafts:
        proposers["draft"] = core.proposer
    for case in cases:
        asked, result = prompts[case.name][: effort.check_prompts], results[case.name]
        result.lossless = True
        for temperature in (CHECK_TEMPERATURE, 0.0):
            params = [
                SamplingParams(temperature=temperature, max_tokens=effort.check_tokens,
                               ignore_eos=True, logprobs=0, seed=seed)
                for seed in range(len(asked))
            ]  # fmt: skip
            core.proposer = None
            expected = engine.generate(asked, params)
            core.proposer, tally = proposers[case.speculator], Tally()
            core.stats.speculation = tally
            found = engine.generate(asked, params)
            for one, other in zip(found, expected, strict=True):
                text = _mismatch(one.outputs[0], other.outputs[0])
                if text is not None:
                    result.lossless = False
                    tqdm.write(f"{case.name}: NOT LOSSLESS, temperature {temperature:g}, {text}")
        # Acceptance is that of the greedy outputs, as in the measured runs.
        result.forced = Counts(
            num_drafts=tally.num_drafts,
            drafted=tuple(tally.num_drafted_per_pos),
            accepted=tuple(tally.num_accepted_per_pos),
        )


def _mismatch(found: Any, expected: Any) -> str | None:
    """Return where and how two outputs first differ; ``None`` if they are the same."""
    place = first_difference(found.token_ids, expected.token_ids)
    if place is None:
        return None

    def told(output: Any) -> str:
        if place >= len(output.token_ids):
            return "nothing"
        return f"token {output.token_ids[place]} (logprob {output.logprobs[place].logprob:.6f})"

    return f"output position {place}: {told(found)} with speculation, {told(expected)} without"
