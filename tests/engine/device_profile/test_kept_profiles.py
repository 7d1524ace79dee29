"""What engines do with profiles: measure little, keep all, refine when idle, and plan by it."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from known_device import SETTINGS, Device, never, rough, start_afresh, truth
from waiting import PATIENCE_S

from minserve import AsyncEngine, Engine, SamplingParams
from minserve.engine.profile import profile_cache, refinement
from minserve.engine.profile.profile_cache import Profile
from minserve.engine.profile.profile_design import ProfileBatch
from minserve.engine.profile.profiler import Survey

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG_IDLE_S = 1000.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device.installed(monkeypatch)


@pytest.fixture(autouse=True)
def _start_afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start_afresh(monkeypatch, tmp_path)


def test_a_kept_profile_is_not_measured_again_however_rough_or_poor(
    tiny_llama_dir: Path, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.slowdown = lambda batch: random.Random(str(batch.runs)).choice([1.0, 4.0, 12.0])
    with caplog.at_level(logging.WARNING):
        poor = Engine(str(tiny_llama_dir), **SETTINGS).profile(40.0)
    assert poor.is_poor
    assert "was the machine busy?" in caplog.text
    del device.runs[:]
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    assert engine.profile(40.0).to_dict() == poor.to_dict()
    assert device.runs == []
    assert engine.perf_model.margin == poor.model.margin


def test_of_several_first_starts_one_measures_and_the_others_wait(
    tiny_llama_dir: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Engine(str(tiny_llama_dir), **SETTINGS) for _ in range(2))
    first.model_name = second.model_name = "tiny"
    lock, waits = fcntl.flock, threading.Event()

    def watched(*args: int) -> None:
        try:
            lock(*args)
        except BlockingIOError:
            waits.set()
            raise

    monkeypatch.setattr(profile_cache.fcntl, "flock", watched)
    found: list[Profile] = []
    starting = threading.Thread(target=lambda: found.append(second.profile(30.0)))
    with profile_cache.alone_with(profile_cache.profile_key(first._core, "tiny"), 0.0):
        starting.start()
        assert waits.wait(PATIENCE_S)
        measured = replace(rough(first), allowed_s=30.0)
        profile_cache.save(measured)
        del device.runs[:]
    starting.join(PATIENCE_S)
    assert found[0].to_dict() == measured.to_dict()
    assert device.runs == []


def test_a_start_does_not_wait_for_ever(tiny_llama_dir: Path, device: Device) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    key = profile_cache.profile_key(engine._core, engine.model_name)
    with profile_cache.alone_with(key, 0.0) as alone:
        assert alone
        engine.profile(0.05)
    assert device.runs


@pytest.mark.usefixtures("device")
def test_who_allows_more_time_goes_on_from_what_is_kept(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    engine.model_name = "tiny"
    before = rough(engine)
    found = engine.profile(40.0)
    assert found.allowed_s == 40.0
    assert len(found.runs) > len(before.runs)
    assert all(found.runs[shape][: len(runs)] == runs for shape, runs in before.runs.items())
    assert engine.profile(40.0).to_dict() == found.to_dict()


@pytest.mark.usefixtures("device")
def test_a_cache_that_cannot_be_written_is_a_warning(
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    with caplog.at_level(logging.WARNING):
        engine.profile(3.0)
    assert "could not be kept" in caplog.text
    while engine.refine(LONG_IDLE_S, never) is not None:
        pass
    assert engine._core.snapshot().profile_completeness == 1.0


def test_an_idle_engine_plans_by_the_refined_profile(
    tiny_llama_dir: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(refinement, "FIRST_IDLE_S", 0.0)
    monkeypatch.setattr(refinement, "IDLE_SHARE", 1000.0)
    # A probe that is wrong by a third everywhere.
    device.slowdown = lambda _: 1.5
    kept = Engine(str(tiny_llama_dir), **SETTINGS)
    kept.model_name = tiny_llama_dir.name
    survey = Survey(kept._core, kept.model_name)
    for batch in survey.batches[:12]:
        survey.measure(batch)
    profile_cache.save(survey.profile(3.0))
    device.slowdown = lambda _: 1.0

    async def main() -> None:
        engine = AsyncEngine(str(tiny_llama_dir), **SETTINGS)
        await engine.start()
        try:
            rough_s = engine.perf_model.zero_load_decode_s(100)
            async with asyncio.timeout(PATIENCE_S):
                while engine.stats().profile_completeness < 1.0:
                    await asyncio.sleep(0.01)
            refined_s = engine.perf_model.zero_load_decode_s(100)
            assert rough_s == pytest.approx(1.5 * truth(ProfileBatch(decodes=(100,))), rel=0.01)
            assert refined_s == pytest.approx(truth(ProfileBatch(decodes=(100,))), rel=0.02)
            assert [d async for d in engine.generate([5, 6, 7], GREEDY)]
        finally:
            await engine.stop()

    asyncio.run(main())
    assert caplog.text.count("profile is full now") == 1


def test_a_stopped_engine_keeps_what_it_measured(
    tiny_llama_dir: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "FIRST_IDLE_S", 0.0)
    monkeypatch.setattr(refinement, "IDLE_SHARE", 1000.0)
    monkeypatch.setattr(refinement, "SAVE_S", 1e9)

    async def main() -> Profile:
        engine = AsyncEngine(str(tiny_llama_dir), **SETTINGS)
        engine.model_name = "tiny"
        before = rough(engine)
        engine.profile(3.0)
        await engine.start()
        num_probed = len(device.runs)
        async with asyncio.timeout(PATIENCE_S):
            while len(device.runs) < num_probed + 8:
                await asyncio.sleep(0.005)
        await engine.stop()
        return before

    before = asyncio.run(main())
    kept = profile_cache.load(before.key)
    assert sum(map(len, kept.runs.values())) >= sum(map(len, before.runs.values())) + 6
