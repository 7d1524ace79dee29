"""The idle speed that is kept in a file: what it says, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minserve.errors import WorkloadError
from minserve.machine import Machine, machine_words
from minserve.workload.reference import Reference, check_can_save
from minserve.workload.zero_load import ZeroLoad

SPEED = ZeroLoad(base_s=0.02, per_token_s=0.001, decode_s=0.03, characters_per_token=4.2)


def saved(path: Path, **changes: Any) -> Path:
    """A file, with some of its values changed."""
    Reference.now(SPEED, "smollm2", "somebody").save(path)
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | changes))
    return path


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    file = saved(tmp_path / "idle.json")
    found = Reference.load(file, "smollm2")
    assert found.speed == SPEED
    assert (found.model, found.server, found.machine) == ("smollm2", "somebody", machine_words())
    assert found.measured_at in str(found)
    assert Reference.load(file) == found


def test_a_machine_with_a_quota_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = replace(Machine.look(), cpu_quota=None)
    monkeypatch.setattr(Machine, "look", lambda: now)
    whole = machine_words()
    monkeypatch.setattr(Machine, "look", lambda: replace(now, cpu_quota=1.5))
    assert machine_words() == whole.replace(" cores,", " cores limited to 1.5,")
    assert machine_words() != whole


def test_another_models_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "idle.json")
    with pytest.raises(WorkloadError, match=r"of the model 'smollm2', not of 'other'"):
        Reference.load(file, "other")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "minserve zero load, 99"},
        {"model": None},
        {"zero_load": {}},
        {"zero_load": {**SPEED.to_dict(), "decode_ms": "fast"}},
        {"zero_load": {**SPEED.to_dict(), "decode_ms": -1}},
        {"zero_load": {**SPEED.to_dict(), "base_ms": float("nan")}},
        {"zero_load": {**SPEED.to_dict(), "characters_per_token": 0}},
    ],
)
def test_a_file_with_something_else_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = saved(tmp_path / "idle.json", **changes)
    with pytest.raises(WorkloadError, match="holds no zero load"):
        Reference.load(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", "base_ms"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "idle.json"
    file.write_text(text)
    with pytest.raises(WorkloadError, match="holds no zero load"):
        Reference.load(file)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        Reference.load(tmp_path / "idle.json")


def test_no_file_is_written_over(tmp_path: Path) -> None:
    file = saved(tmp_path / "idle.json")
    before = file.read_text()
    with pytest.raises(WorkloadError, match="exists already"):
        check_can_save(file)
    with pytest.raises(WorkloadError, match="File exists"):
        Reference.now(SPEED, "other", "somebody").save(file)
    assert file.read_text() == before


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no folder"):
        check_can_save(tmp_path / "no" / "idle.json")
    check_can_save(tmp_path / "idle.json")
