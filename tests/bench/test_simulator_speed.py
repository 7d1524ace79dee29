"""Two checkouts take turns, and what they simulate is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulator_speed import OWN, PROFILE, TRACE, compare, importable, measure

FLAGS = [*TRACE, *PROFILE, "--num-requests", "20"]


def test_a_checkout_takes_turns_with_itself() -> None:
    found = compare(OWN, 2, FLAGS)
    assert len(found["own_s"]) == len(found["other_s"]) == len(found["ratios"]) == 2
    assert min(found["own_s"] + found["other_s"]) > 0
    assert found["same_results"]


def test_another_checkout_is_run_and_its_difference_seen(tmp_path: Path) -> None:
    for part in ("kernels", "models"):
        (tmp_path / part).symlink_to(OWN / part)
    package = tmp_path / "minserve"
    package.mkdir()
    for part in (OWN / "minserve").iterdir():
        if part.name != "__main__.py":
            (package / part.name).symlink_to(part)
    package.joinpath("__main__.py").write_text('print("{}")\n')
    assert not compare(tmp_path, 1, FLAGS)["same_results"]


def test_a_simulation_that_fails_ends_the_measurement() -> None:
    with importable(OWN) as own, pytest.raises(SystemExit, match="failed"):
        measure(own, ["--trace", "no-such-trace"])
