"""Refining a profile in idle moments: in nobody's way, and adding up."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
from known_device import NUM_BATCHES, SETTINGS, Device, never, rough, start_afresh, truth

from minserve import Engine, SamplingParams
from minserve.engine.profile import profile_cache, profiler, refinement
from minserve.engine.profile.profile_cache import Profile
from minserve.engine.profile.profile_design import CoreLimits, ProfileBatch
from minserve.engine.profile.profiler import MOST_REPEATS, REPEATS, Survey
from minserve.engine.profile.refinement import IDLE_SHARE, LONGEST_S, Refinement
from minserve.planner.predict.perf_model import BatchShape

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG_IDLE_S = 1000.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device.installed(monkeypatch)


@pytest.fixture(autouse=True)
def _start_afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start_afresh(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(str(tiny_llama_dir), **SETTINGS)


def refine(engine: Engine, profile: Profile) -> tuple[Refinement, list[Profile]]:
    published: list[Profile] = []
    return Refinement(engine._core, "tiny", profile, published.append), published


def finish(one: Refinement, idle_s: float = LONG_IDLE_S) -> None:
    while one.step(idle_s, never) is not None:
        pass


# --- in nobody's way ---


def test_nothing_is_measured_before_the_engine_was_idle_for_a_while(
    engine: Engine, device: Device
) -> None:
    one, _ = refine(engine, rough(engine))
    del device.runs[:]
    assert one.step(0.5, never) == 1.5
    assert device.runs == []


@pytest.mark.parametrize("idle_s", [2.0, 8.0, 20.0, 40.0, LONG_IDLE_S])
def test_the_longer_nobody_came_the_longer_a_batch_may_take(
    engine: Engine, device: Device, idle_s: float
) -> None:
    one, _ = refine(engine, rough(engine))
    del device.runs[:]
    num_runs = -1
    while len(device.runs) > num_runs:
        num_runs = len(device.runs)
        rest_s = one.step(idle_s, never)
    predict = one.profile.model.profiled
    longest_s = max((predict(batch.shape) for batch in device.runs), default=0.0)
    step_s = predict(BatchShape.of([(16, 1)]))
    assert step_s <= longest_s <= min(max(IDLE_SHARE * idle_s, 1.001 * step_s), LONGEST_S)
    if rest_s is not None:  # and asks to be called when the next one may run
        later = len(device.runs)
        one.step(idle_s + rest_s + 1e-6, never)
        assert len(device.runs) == later + 2


def test_a_slow_device_is_measured_by_its_own_steps(engine: Engine, device: Device) -> None:
    device.slowdown = lambda _: 100.0
    one, _ = refine(engine, rough(engine))
    finish(one, 100 * LONG_IDLE_S)
    survey = Survey(engine._core, "tiny", kept=one.profile)
    reach_s = 4.0 * 100.0 * truth(ProfileBatch(decodes=(1,)))
    assert one.completeness == 1.0
    repeated = [100.0 * truth(b) for b in survey.batches if len(survey.runs(b)) > 1]
    assert LONGEST_S < max(repeated) <= reach_s


def test_a_profile_of_a_very_busy_hour_is_soon_put_right(engine: Engine, device: Device) -> None:
    """Its batches seem too long for short idle moments, and are not."""
    device.slowdown = lambda _: 100.0
    profile = rough(engine)
    device.slowdown = lambda _: 1.0
    one, _ = refine(engine, profile)
    for _ in range(150):
        one.step(20.0, never)
    one.save()
    for batch in (ProfileBatch(decodes=(100,) * 4), ProfileBatch(chunks=((0, 16),))):
        assert one.profile.model.profiled(batch.shape) == pytest.approx(truth(batch), rel=0.1)
    assert max(map(truth, device.runs[12:])) <= IDLE_SHARE * 20.0 * 1.01


def test_who_comes_waits_for_one_run_at_most(engine: Engine, device: Device) -> None:
    one, _ = refine(engine, rough(engine))
    del device.runs[:]
    one.step(LONG_IDLE_S, lambda: True)
    assert device.runs == []
    one.step(LONG_IDLE_S, lambda: bool(device.runs))
    assert len(device.runs) == 1
    one.save()
    assert one.profile.runs == rough(engine).runs  # half a measurement is none


@pytest.mark.usefixtures("device")
def test_a_fit_ends_when_somebody_comes_and_is_made_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "NUM_BATCHES", 60)  # enough for a fit of two pieces
    one, published = refine(engine, rough(engine, 40))
    one.step(LONG_IDLE_S, never)
    one.save(is_wanted=lambda: True)
    assert published == []
    one.save()
    assert published == [one.profile]
    assert sum(map(len, one.profile.runs.values())) == 40 + 2


def test_cached_prefixes_stay_where_they_are(tiny_llama_dir: Path) -> None:
    """On the real device: blocks, index and outputs are what they were."""
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    probed = rough(engine)
    prompt = list(range(5, 200))
    before = engine.generate(prompt, GREEDY)[0].outputs[0].token_ids
    pool = engine._core.pool
    index = dict(pool._index)
    assert len(index) == 25  # full blocks of 8
    one, _ = refine(engine, probed)
    for _ in range(60):
        one.step(LONG_IDLE_S, never)
    engine._core.check_integrity()
    one.save()
    assert sum(map(len, one.profile.runs.values())) > 20
    assert pool._index == index
    hits = pool.prefix_hits_tokens
    assert engine.generate(prompt, GREEDY)[0].outputs[0].token_ids == before
    assert pool.prefix_hits_tokens == hits + 192


def test_a_batch_that_needs_a_cached_block_is_not_run(tiny_llama_dir: Path, device: Device) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    pool = engine._core.pool
    for first in (5, 205, 305):
        engine.generate([list(range(first, first + 190))], GREEDY)
    blank = pool.num_blocks - len(pool._index)
    assert 0 < blank < 60
    one, _ = refine(engine, rough(engine))
    del device.runs[:]
    finish(one)
    limits = CoreLimits.of(engine._core)
    needed = [sum(limits.blocks(start + n) for start, n in b.runs) for b in device.runs]
    assert 0 < max(needed) <= blank
    assert one.completeness < 1.0


def test_an_error_ends_the_refinement_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    engine.profile(0.1)

    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken, caplog.at_level(logging.ERROR):
        broken.setattr(engine._core.runner, "run", fail)
        while engine.refine(LONG_IDLE_S, never) is not None:
            pass
    assert "refining the profile failed" in caplog.text
    assert engine._core.pool.num_free_blocks == engine._core.pool.num_blocks
    assert engine.refine(LONG_IDLE_S, never) is None
    assert len(engine.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids) == 8


# --- adding up ---


@pytest.mark.usefixtures("device")
def test_all_batches_within_reach_are_measured_often_enough(engine: Engine) -> None:
    one, published = refine(engine, rough(engine))
    assert 0.0 < one.completeness < 0.5
    finish(one)
    assert one.completeness == 1.0
    survey = Survey(engine._core, "tiny", kept=one.profile)
    near = [batch for batch in survey.batches if truth(batch) < 0.95 * LONGEST_S]
    assert len(near) > NUM_BATCHES // 2
    for batch in near:
        assert REPEATS <= len(survey.runs(batch)) <= MOST_REPEATS + 1
    far = [batch for batch in survey.batches[12:] if truth(batch) > 1.05 * LONGEST_S]
    assert far
    assert not any(survey.runs(batch) for batch in far)
    assert published[-1] is one.profile
    assert profile_cache.load(one.profile.key).to_dict() == one.profile.to_dict()
    assert one.profile.allowed_s == 3.0
    for batch in survey.batches:
        assert one.profile.model.profiled(batch.shape) == pytest.approx(truth(batch), rel=0.01)


@pytest.mark.usefixtures("device")
def test_a_start_goes_on_from_what_an_earlier_one_kept(engine: Engine) -> None:
    first, _ = refine(engine, rough(engine))
    for _ in range(20):
        first.step(LONG_IDLE_S, never)
    first.save()
    kept = profile_cache.load(first.profile.key)
    num_kept = sum(map(len, kept.runs.values()))
    assert num_kept > 12
    second, _ = refine(engine, kept)
    assert second.completeness == first.completeness
    finish(second)
    profile_cache.profile_path(kept.key).unlink()
    in_one_go, _ = refine(engine, rough(engine))
    finish(in_one_go)
    assert {shape: len(runs) for shape, runs in second.profile.runs.items()} == {
        shape: len(runs) for shape, runs in in_one_go.profile.runs.items()
    }


def test_a_full_profile_is_not_measured_again(engine: Engine, device: Device) -> None:
    one, _ = refine(engine, rough(engine))
    finish(one)
    del device.runs[:]
    again, published = refine(engine, one.profile)
    assert again.completeness == 1.0
    assert again.step(LONG_IDLE_S, never) is None
    assert (device.runs, published) == ([], [])


def test_runs_on_a_device_that_rested_do_not_count(engine: Engine, device: Device) -> None:
    """Every first run of two takes half as long again."""
    turns = iter(range(10**6))
    profile = rough(engine)
    device.slowdown = lambda _: 1.0 if next(turns) % 2 else 1.5
    one, _ = refine(engine, profile)
    finish(one)
    assert one.completeness == 1.0
    assert one.profile.model.margin < 1.05


def test_a_busy_hour_is_corrected_by_later_ones(engine: Engine, device: Device) -> None:
    rng = random.Random(3)
    device.slowdown = lambda _: rng.choice([1.0, 2.0, 6.0])
    poor = rough(engine, NUM_BATCHES)
    assert poor.is_poor
    assert poor.model.margin > 1.5
    device.slowdown = lambda _: 1.0
    one, _ = refine(engine, poor)
    finish(one)
    assert not one.profile.is_poor
    assert one.profile.quality.mape < poor.quality.mape / 2


@pytest.mark.usefixtures("device")
def test_two_engines_of_one_key_add_up_what_they_measured(engine: Engine) -> None:
    profile = rough(engine)
    (one, _), (two, _) = refine(engine, profile), refine(engine, profile)
    for _ in range(5):
        one.step(LONG_IDLE_S, never)
        two.step(LONG_IDLE_S, never)
    one.save()
    two.save()
    kept = profile_cache.load(profile.key)
    assert sum(map(len, kept.runs.values())) == 12 + 5 * 2 * 2
    assert kept.to_dict() == two.profile.to_dict()
    assert kept.seconds == pytest.approx(sum(sum(runs) for runs in kept.runs.values()), rel=0.5)


def test_another_process_that_measures_the_same_has_the_device_alone(
    engine: Engine, device: Device
) -> None:
    one, _ = refine(engine, rough(engine))
    del device.runs[:]
    with profile_cache.alone_with(one.profile.key, 0.0) as alone:
        assert alone
        assert one.step(LONG_IDLE_S, never) == refinement.TURN_S
        assert device.runs == []
    one.step(LONG_IDLE_S, never)
    assert len(device.runs) == 2


SAVES = """
import json, sys
from dataclasses import replace
from minserve.engine.profile import profile_cache
from minserve.engine.profile.profile_cache import Profile

profile = Profile.from_dict(json.loads(open(sys.argv[1]).read()))
shape = next(iter(profile.runs))
for _ in range(25):
    with profile_cache.alone_with(profile.key, 60.0) as alone:
        assert alone
        kept = profile_cache.load(profile.key)
        profile_cache.save(replace(kept, runs={**kept.runs, shape: (*kept.runs[shape], 1.0)}))
"""


@pytest.mark.usefixtures("device")
def test_processes_that_save_at_once_lose_nothing(engine: Engine) -> None:
    profile = rough(engine)
    path = str(profile_cache.profile_path(profile.key))
    writers = [subprocess.Popen([sys.executable, "-c", SAVES, path]) for _ in range(2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    kept = profile_cache.load(profile.key)
    shape = next(iter(profile.runs))
    assert kept.runs[shape] == (*profile.runs[shape], *[1.0] * 50)


@pytest.mark.usefixtures("device")
def test_a_folder_that_cannot_be_written_costs_the_next_start_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = rough(engine)
    profile_cache.save(start)

    def refuse(_: Profile) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(profile_cache, "save", refuse)
    one, published = refine(engine, start)
    finish(one)
    assert one.completeness == 1.0
    assert sum(map(len, published[-1].runs.values())) > sum(map(len, start.runs.values()))
    assert sum("could not be kept" in record.message for record in caplog.records) == 1
