"""Profiling a real core: what is measured, what is left behind, what is kept on disk."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve import Engine, SamplingParams
from minserve.engine.profile import profile_cache, profiler
from minserve.engine.profile.profile_cache import Profile, ProfileKey, profile_key
from minserve.engine.profile.profile_design import CoreLimits, ProfileBatch, design
from minserve.engine.profile.profiler import profile_core, undisturbed
from minserve.errors import ProfileError
from minserve.machine import Machine
from minserve.planner.predict.perf_model import BatchShape
from minserve.request import Request, Sequence

SETTINGS = {"device": "cpu", "dtype": "float32", "threads": 1, "token_budget": 128, "max_num_seqs": 16,
            "num_blocks": 120, "block_size": 8}  # fmt: skip
SERVER = CoreLimits(
    token_budget=512, max_num_seqs=128, longest=8192, num_blocks=2912, block_size=32
)


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(str(tiny_llama_dir), **SETTINGS)


@pytest.fixture(scope="module")
def profile(engine: Engine) -> Profile:
    return profile_core(engine._core, "tiny", seconds=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- which batches ---


@settings(max_examples=60)
@given(
    st.builds(
        CoreLimits,
        token_budget=st.integers(1, 600),
        max_num_seqs=st.integers(1, 130),
        longest=st.integers(1, 9000),
        num_blocks=st.integers(1, 300),
        block_size=st.integers(1, 40),
    ),
    st.integers(0, 3),
)
def test_no_batch_exceeds_what_the_core_can_run(limits: CoreLimits, seed: int) -> None:
    limits = replace(limits, longest=min(limits.longest, limits.num_blocks * limits.block_size))
    batches = design(limits, 60, seed)
    assert len(set(batches)) == len(batches) <= 60
    for batch in batches:
        ends = [start + n for start, n in batch.runs]
        assert 1 <= batch.shape.tokens <= limits.token_budget
        assert len(ends) <= limits.max_num_seqs
        assert max(ends) <= limits.longest
        assert sum(-(-end // limits.block_size) for end in ends) <= limits.num_blocks
        assert all(start >= 1 for start in batch.decodes)
        assert all(start >= 0 and n >= 1 for start, n in batch.chunks)


@pytest.mark.parametrize("count", [30, 60, 96])
def test_any_beginning_of_the_list_covers_what_a_server_runs(count: int) -> None:
    batches = design(SERVER, 96, seed=0)[:count]
    decodes = [b for b in batches if b.decodes and not b.chunks]
    chunks = [b for b in batches if b.chunks and not b.decodes]
    mixes = [b for b in batches if b.chunks and b.decodes]
    assert min(len(decodes), len(chunks), len(mixes)) >= count // 5
    assert min(b.shape.seqs for b in decodes) == 1
    assert max(b.shape.seqs for b in decodes) >= 48
    assert max(b.shape.context_tokens for b in decodes) > 10_000
    assert max(b.shape.tokens for b in chunks) > 256
    assert max(b.chunks[0][0] for b in chunks) > 1024
    assert sum(b.chunks[0][0] == 0 for b in chunks) >= len(chunks) // 4


def test_the_same_seed_gives_the_same_batches() -> None:
    assert design(SERVER, 40, 1) == design(SERVER, 40, 1) != design(SERVER, 40, 2)


# --- measuring ---


def test_a_profile_predicts_batches_and_says_how_well(profile: Profile, engine: Engine) -> None:
    assert profile.key == profile_key(engine._core, "tiny")
    assert profile.torch == torch.__version__
    assert len(profile.samples) >= profiler.LEAST_BATCHES
    assert profile.quality.num_samples == len(profile.held_out) == round(len(profile.samples) / 4)
    measured = {s.shape: s.seconds for s in profile.samples}
    assert len(measured) == len(profile.samples)
    for one in profile.held_out:
        assert one.measured_s == measured[one.shape] > 0
        assert one.predicted_s > 0
    # What lies within what: one batch within all of them, and these within the whole.
    assert 0 < profile.model.profiled(BatchShape.of([(0, 64)])) < sum(measured.values())
    assert sum(measured.values()) < profile.seconds


def test_every_batch_runs_as_the_design_says(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, seen = engine._core, []
    run = core.runner.run

    def spy(batch: list) -> object:
        seen.append(
            ProfileBatch(
                tuple(i.start for i in batch if i.seq.is_decoding),
                tuple((i.start, i.num_tokens) for i in batch if not i.seq.is_decoding),
            )
        )
        results = run(batch)
        assert all(result.sampled.tokens[0].token_id >= 0 for result in results.values())
        blocks = [block for item in batch for block in item.seq.block_table]
        assert len(set(blocks)) == len(blocks)
        for kv in core.runner.kv:  # written before it is read, also where nothing ever ran
            assert all(kv.key[block].any() and kv.value[block].any() for block in blocks)
        return results

    monkeypatch.setattr(core.runner, "run", spy)
    samples = profile_core(core, "tiny", seconds=0.01).samples
    expected = design(CoreLimits.of(core), profiler.NUM_BATCHES, seed=0)[: len(samples)]
    assert [b.shape for b in expected] == [s.shape for s in samples]
    assert set(seen) == set(expected)


def test_nothing_is_left_behind(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    core = engine._core
    profile_core(core, "tiny", seconds=0.3)
    core.check_integrity()
    assert core.pool.num_free_blocks == core.pool.num_blocks
    assert core.pool._index == {}
    assert (core.pool.prefix_queries_tokens, core.has_work) == (0, False)


def test_output_after_a_profile_is_what_it_was(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompt = list(range(5, 60))
    before = engine.generate(prompt, params)[0].outputs[0].token_ids
    profile_core(engine._core, "tiny", seconds=0.1)
    assert engine.generate(prompt, params)[0].outputs[0].token_ids == before


def test_blocks_come_back_when_the_runner_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._core.runner, "run", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        profile_core(engine._core, "tiny", seconds=0.1)
    assert engine._core.pool.num_free_blocks == engine._core.pool.num_blocks
    engine._core.check_integrity()


def test_a_core_at_work_is_refused(engine: Engine) -> None:
    request = Request(
        request_id="busy",
        prompt_token_ids=(5, 6, 7),
        params=SamplingParams(),
        seed=0,
        arrival_s=0.0,
    )
    engine._core.add(Sequence(request), None)
    try:
        with pytest.raises(ProfileError, match="idle"):
            profile_core(engine._core, "tiny", seconds=0.1)
    finally:
        engine._core.abort("busy")


def test_a_core_too_small_for_different_batches_is_refused(tiny_llama_dir: Path) -> None:
    tiny = {"token_budget": 1, "max_num_seqs": 1, "num_blocks": 1, "block_size": 2}
    engine = Engine(str(tiny_llama_dir), **SETTINGS | tiny)
    with pytest.raises(ProfileError, match="at least"):
        profile_core(engine._core, "tiny", seconds=0.1)


def test_disturbed_repeats_do_not_count() -> None:
    assert undisturbed([2.0]) == 2.0
    assert undisturbed([1.0, 1.1, 9.0]) == pytest.approx(1.05)
    assert undisturbed([7.0, 1.0, 9.0]) == 1.0


def test_what_a_disturbance_spoiled_is_measured_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of known speed that takes tenfold for its first 30 batches."""
    truth, calls = {}, []

    def timed(_: object, batch: ProfileBatch) -> float:
        truth[batch.shape] = seconds = 1e-3 + 1e-5 * batch.shape.tokens
        calls.append(batch)
        return seconds * (10 if len(calls) <= 30 else 1)

    monkeypatch.setattr(profiler.Workbench, "time", timed)
    found = profile_core(engine._core, "tiny", seconds=20.0)
    assert len(found.samples) > 80
    assert [s.seconds for s in found.samples] == pytest.approx(
        [truth[s.shape] for s in found.samples]
    )
    assert found.quality.r2 > 0.999
    assert max(calls.count(batch) for batch in calls) <= profiler.MOST_REPEATS + 1  # the warm-up


# --- keys and files ---


def test_the_key_tells_models_and_settings_apart(
    engine: Engine, tiny_llama_dir: Path, tiny_opt_dir: Path
) -> None:
    def key(folder: Path, **more: object) -> ProfileKey:
        return profile_key(Engine(str(folder), **SETTINGS | more)._core, "model")

    llama = profile_key(engine._core, "model")
    assert key(tiny_llama_dir) == llama
    assert key(tiny_opt_dir) != llama
    assert llama.threads == 1
    assert llama.dtype == "float32"
    assert llama.attention == "torch"
    assert key(tiny_llama_dir, dtype="float16").dtype == "float16 in float32"
    assert key(tiny_llama_dir, threads=2).threads == 2
    torch.set_num_threads(1)
    paths = {
        profile_cache.profile_path(k)
        for k in (
            llama,
            replace(llama, model="x"),
            replace(llama, threads=9),
            replace(llama, attention="x"),
        )
    }
    assert len(paths) == 4


def test_a_core_that_a_container_stops_at_times_is_another_device(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile_key(engine._core, "model")
    now = Machine.look()
    for quota, device in ((None, whole.device), (1.5, whole.device),
                          (0.5, f"{whole.device} limited to 0.5 CPUs")):  # fmt: skip
        monkeypatch.setattr(Machine, "look", lambda quota=quota: replace(now, cpu_quota=quota))
        assert profile_key(engine._core, "model") == replace(whole, device=device)


def test_a_saved_profile_comes_back(profile: Profile, cache: Path) -> None:
    assert profile_cache.load(profile.key) is None
    path = profile_cache.save(profile)
    assert path.parent == cache / "minserve" / "profiles"
    assert path.name.startswith("tiny-")
    found = profile_cache.load(profile.key)
    assert found.to_dict() == profile.to_dict()
    assert found.model.pieces == profile.model.pieces
    newer = replace(profile, measured_at="2100-01-01T00:00:00+00:00")
    assert profile_cache.save(newer) == path
    assert profile_cache.load(profile.key).measured_at == newer.measured_at
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_xdg_profiles_lie_under_dot_cache(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_cache.profile_path(profile.key).is_relative_to(tmp_path / ".cache" / "minserve")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:0],
        lambda text: text[: len(text) // 2],
        lambda text: f"[{text}]",
        lambda text: json.dumps({**json.loads(text), "format": 0}),
        lambda text: json.dumps({**json.loads(text), "runs": [3]}),
        lambda text: json.dumps({**json.loads(text), "runs": [[1, 1, 1, 1, 0, 0, []]]}),
        lambda text: json.dumps({**json.loads(text), "runs": [[1, 1, 1, 1, 0, 0, [0.0]]]}),
        lambda text: json.dumps({**json.loads(text), "model": None}),
        lambda text: json.dumps({**json.loads(text), "model": {"pieces": [], "margin": 1}}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "quality"}),
        lambda text: text.replace('"tiny (', '"other ('),
        lambda text: text.replace('"tiny (', '"\udcff ('),
        lambda _: "[" * 100_000,
        lambda text: json.dumps({**json.loads(text), "seconds": 10**400}),
        lambda text: json.dumps({**json.loads(text), "allowed_s": None}),
        lambda text: json.dumps({**json.loads(text), "quality": "good"}),
        lambda text: json.dumps({**json.loads(text), "quality": {"r2": "good"}}),
        lambda text: json.dumps({**json.loads(text), "runs": [[1.5, 1, 1, 1, 0, 0, [1.0]]]}),
        lambda text: json.dumps({**json.loads(text), "runs": [["a", 1, 1, 1, 0, 0, [1.0]]]}),
        lambda text: json.dumps({**json.loads(text), "runs": [[-1, 1, 1, 1, 0, 0, [1.0]]]}),
    ],
)
def test_an_unusable_file_is_a_warning_and_no_profile(
    profile: Profile, spoil: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = profile_cache.save(profile)
    path.write_text(spoil(path.read_text()), errors="surrogateescape")
    with caplog.at_level(logging.WARNING):
        assert profile_cache.load(profile.key) is None
    assert str(path) in caplog.text


def test_a_failed_save_leaves_the_old_profile_and_no_rest(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = profile_cache.save(profile)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(profile_cache.json, "dump", fail)
    with pytest.raises(OSError, match="disk full"):
        profile_cache.save(profile)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_user_without_a_home_folder_has_no_cache_and_starts(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert profile_cache.load(profile.key) is None
    with profile_cache.alone_with(profile.key, 0.0) as alone:
        assert alone
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        profile_cache.save(profile)
