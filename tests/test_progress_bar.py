"""Progress: a bar on a terminal, few whole lines in a log."""

from __future__ import annotations

import io
import os
import pty
from pathlib import Path

import pytest
from tqdm import tqdm

from minserve import progress_bar as progress
from minserve.progress_bar import LogProgress, progress_bar
from minserve.workload.server_process import ServerProcess, minserve_command


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    # tqdm asks its own clock before it asks for a line.
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    return clock


def work(clock: Clock, seconds: int, **options: object) -> list[str]:
    """Return the lines of work with an update each second."""
    log = io.StringIO()
    with progress_bar(total=seconds, desc="Work", file=log, **options) as bar:
        for _ in range(seconds):
            clock.now += 1
            bar.update()
    return log.getvalue().splitlines()


def done_at(lines: list[str]) -> list[int]:
    return [int(line.split("%")[1].split("/")[0]) for line in lines]


def test_long_work_writes_lines_ever_less_often(clock: Clock) -> None:
    lines = work(clock, 300)
    assert done_at(lines) == [5, 10, 20, 40, 80, 140, 200, 260, 300]
    assert all(line.startswith("Work: ") for line in lines)


def test_short_work_leaves_nothing_in_a_log(clock: Clock) -> None:
    assert work(clock, 4) == []


def test_work_that_leaves_no_bar_leaves_no_last_line(clock: Clock) -> None:
    assert done_at(work(clock, 8, leave=False)) == [5]
    assert done_at(work(clock, 8)) == [5, 8]
    assert done_at(work(clock, 5)) == [5]


def test_work_without_progress_writes_nothing(clock: Clock) -> None:
    assert work(clock, 300, disable=True) == []


def test_messages_and_refreshes_between_lines_add_none(clock: Clock) -> None:
    log = io.StringIO()
    with progress_bar(total=9, file=log, desc="Work", leave=False) as bar:
        for number in range(9):
            clock.now += 1
            bar.update()
            bar.set_postfix_str(f"at {number}")
            tqdm.write(f"said {number}", file=log)
            bar.refresh()
    lines = log.getvalue().splitlines()
    assert [line for line in lines if line.startswith("said")] == [f"said {n}" for n in range(9)]
    assert len(lines) == 10
    assert "\r" not in log.getvalue()


def test_an_iterable_is_gone_through() -> None:
    assert list(progress_bar(range(3), file=io.StringIO())) == [0, 1, 2]


def test_a_terminal_gets_a_bar() -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        bar = progress_bar(range(3), file=terminal)
        assert type(bar) is tqdm
        bar.close()
        assert type(progress_bar(range(3), file=io.StringIO())) is LogProgress
    os.close(reader)


def test_programs_make_their_bars_here() -> None:
    root = Path(__file__).parents[1]
    found = [
        str(path.relative_to(root))
        for folder in ("minserve", "models", "kernels", "bench", "examples")
        for path in (root / folder).rglob("*.py")
        if "tqdm(" in path.read_text(encoding="utf-8") and path.name != "progress_bar.py"
    ]
    assert found == []


def test_a_first_start_of_a_server_writes_few_lines(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = minserve_command(
        "--model", str(tiny_llama_dir), "--num-blocks", "64", "--threads", "1", "--device", "cpu",
        "--profile-seconds", "0.5",
    )  # fmt: skip
    with ServerProcess(command) as server:
        log = server.last_words()
    assert len(log.splitlines()) < 10
    assert "\r" not in log
