"""``minserve profile`` on a tiny model: what is printed, kept, drawn and refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from minserve.cli.main import main
from minserve.engine.profile import profile_cache, profile_plot, profiler
from minserve.engine.profile.profile_cache import Profile
from minserve.planner.predict.perf_model import PerfModel

SMALL = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--num-blocks", "120",
         "--block-size", "8", "--token-budget", "128", "--max-num-seqs", "16"]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "minserve" / "profiles"


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_plot, "can_plot", lambda: False)


def profile(model: Path, *more: str) -> int:
    return main(["profile", "--model", str(model), *SMALL, "--seconds", "0.2", *more])


def kept(cache: Path) -> Profile:
    (path,) = cache.glob("*.json")
    return Profile.from_dict(json.loads(path.read_text()))


def test_the_last_line_of_json_says_everything(
    tiny_llama_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tiny_llama_dir, "--json") == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    report = json.loads(line)
    found = kept(cache)
    quality = found.quality
    assert [report[name] for name in ("r2", "mape", "p50_error", "p90_error", "p99_error")] == [
        quality.r2,
        quality.mape,
        quality.p50_error,
        quality.p90_error,
        quality.p99_error,
    ]
    assert report["num_shapes"] == len(found.samples)
    assert report["num_held_out"] == quality.num_samples
    assert report["seconds"] == found.seconds
    assert report["pieces"] == found.model.to_dict()["pieces"]
    assert report["zero_load_prefill_512_s"] == found.model.zero_load_prefill_s(512)
    assert report["zero_load_decode_s"] == found.model.zero_load_decode_s(512)
    assert report["dtype"] == "float32"
    assert report["threads"] == 1
    assert report["model"].startswith("tiny-llama")
    assert report["profile"] == str(profile_cache.profile_path(found.key))


@pytest.mark.usefixtures("no_matplotlib")
def test_tables_say_how_fast_and_how_sure(
    tiny_llama_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tiny_llama_dir) == 0
    text, found = capsys.readouterr().out, kept(cache)
    assert "tiny-llama" in text
    assert f"R2 {found.quality.r2:.4f}" in text
    assert f"mean error {found.quality.mape:.1%}" in text
    assert re.search(r"per token .*constant", text)
    assert f"{found.model.pieces[0].tokens * 1e3:.4g}" in text
    for row in found.held_out[:1]:
        assert f"{row.measured_s * 1e3:.1f} ms" in text
    assert f"prefill of 512 tokens {found.model.zero_load_prefill_s(512) * 1e3:.1f} ms" in text
    assert f"kept in {next(cache.glob('*.json'))}" in text
    assert "pip install -e '.[plot]'" in text  # how to get a picture
    assert list(cache.glob("*.png")) == []


@pytest.mark.parametrize(("margin", "busy"), [(1.2, False), (1.9, True)])
def test_a_disturbed_measurement_is_pointed_out(
    margin: float,
    busy: bool,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = profiler.profile_core

    def scattered(*args: object, **options: object) -> Profile:
        found = measure(*args, **options)
        return replace(found, model=PerfModel(found.model.pieces, margin=margin))

    monkeypatch.setattr(profiler, "profile_core", scattered)
    assert profile(tiny_llama_dir, "--no-save") == 0
    assert ("on an idle machine" in capsys.readouterr().out) == busy


def test_a_profile_is_not_kept_where_not_wanted(
    tiny_llama_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tiny_llama_dir, "--no-save", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["profile"], report["plot"]) == (None, None)
    assert list(cache.glob("*.json")) == []


def test_a_cache_that_cannot_be_written_is_one_clear_line_after_the_figures(
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert profile(tiny_llama_dir, "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_shapes"] > 0
    assert "minserve: error: the profile could not be written" in captured.err.splitlines()[-1]


@pytest.mark.usefixtures("no_matplotlib")
def test_a_picture_without_matplotlib_is_refused_before_measuring(
    tiny_llama_dir: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tiny_llama_dir, "--plot", str(tmp_path / "fit.png")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pip install -e '.[plot]'" in captured.err
    assert not cache.exists()


def test_a_picture_is_drawn_beside_the_profile_or_where_asked(
    tiny_llama_dir: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tiny_llama_dir, "--json") == 0
    picture = Path(json.loads(capsys.readouterr().out)["plot"])
    assert picture.parent == cache
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert profile(tiny_llama_dir, "--no-save", "--plot", str(tmp_path / "fit.png")) == 0
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf"])
def test_a_time_that_makes_no_sense_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--seconds", seconds, "--model", "/nowhere/at/all"]) == 1
    assert "seconds must be above 0" in capsys.readouterr().err


def test_help_explains_where_profiles_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["profile", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("--seconds", "--plot", "--json", "--no-save", "--model", "XDG_CACHE_HOME"):
        assert word in text
