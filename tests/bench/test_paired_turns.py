"""Turns in pairs: their order, what is kept of them, and which may be compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from paired import CELL, result

from minserve.workload.reference import Reference
from minserve.workload.zero_load import ZeroLoad
from shared.paired.turns import Pairs, TurnStore, schedule

OTHER = replace(CELL, rate=4.0)
SYSTEMS = ["a", "b", "c", "d"]
REFERENCE = Reference.now(ZeroLoad(0.02, 0.001, 0.03), "smollm2", "the better of both")


def test_turns_of_a_cell_are_a_palindrome_and_the_next_round_begins_with_another() -> None:
    slots = schedule([CELL, OTHER], ["a", "b"], 4)
    assert "".join(one.system for one in slots) == "abba" * 2 + "baab" * 2
    assert [one.cell for one in slots[:8]] == [CELL] * 4 + [OTHER] * 4
    assert [one.pair for one in slots[:4]] == [0, 0, 1, 1]


@pytest.mark.parametrize("pairs", [1, 2, 5, 8])
def test_every_server_has_one_turn_in_each_pair(pairs: int) -> None:
    slots = schedule([CELL, OTHER], SYSTEMS, pairs)
    counts = Counter((one.cell.name, one.pair, one.system) for one in slots)
    assert len(counts) == 2 * pairs * len(SYSTEMS) == len(slots)


def test_over_a_whole_cycle_no_server_comes_earlier_than_another() -> None:
    slots = schedule([CELL], SYSTEMS, 2 * len(SYSTEMS))
    places = dict.fromkeys(SYSTEMS, 0)
    for place, slot in enumerate(slots):
        places[slot.system] += place
    assert len(set(places.values())) == 1


def test_an_interrupted_run_goes_on_and_repeats_pairs_that_are_not_whole(tmp_path: Path) -> None:
    file, settings = tmp_path / "results.json", {"seed": 0, "paces": (2.0, 4.0)}
    slots = schedule([CELL, OTHER], ["a", "b"], 2)
    store = TurnStore(settings, file, REFERENCE)
    for slot in slots[:5]:
        store.add(result(slot.system, slot.pair, 0.9, cell=slot.cell))
    again = TurnStore.resume(file, settings, ["a", "b"])
    assert again.results == store.results[:4]
    assert again.reference == REFERENCE
    assert again.missing(slots) == slots[4:]
    assert not list(tmp_path.glob("*.part"))


def test_a_run_before_its_first_turn_goes_on_too(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    TurnStore({"seed": 0}, file).save()
    again = TurnStore.resume(file, {"seed": 0}, ["a", "b"])
    assert (again.results, again.reference) == ([], None)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    TurnStore({"lengths": 0.1, "seed": 0}, file).save()
    with pytest.raises(SystemExit, match="other settings: lengths"):
        TurnStore.resume(file, {"lengths": 0.2, "seed": 0}, ["a"])


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"settings": {}, "results": [{}]}'])
def test_what_is_no_file_of_results_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit, match="cannot go on"):
        TurnStore.resume(file, {}, ["a"])


def test_pairs_at_different_speeds_are_left_out() -> None:
    slow = {"lone_before_s": 0.06, "lone_after_s": 0.06}
    results = [
        *(result(system, pair, 0.9) for pair in range(4) for system in "ab"),
        # The machine was slow for both, so they may be compared; then it changed in between.
        result("a", 4, 0.5, **slow), result("b", 4, 0.6, **slow),
        result("a", 5, 0.9), result("b", 5, 0.1, lone_after_s=0.06),
        # A little is nothing.
        result("a", 6, 0.9), result("b", 6, 0.8, lone_after_s=0.033),
    ]  # fmt: skip
    pairs = Pairs(results)
    assert [a.pair for a, _ in pairs.kept(CELL, "a", "b")] == [0, 1, 2, 3, 4, 6]
    assert pairs.left_out(CELL, "a", "b") == {"speed changed": 1}


def test_a_server_that_is_slower_itself_is_compared_all_the_same() -> None:
    lone = {"lone_before_s": 0.09, "lone_after_s": 0.09}
    pairs = Pairs([*(result("a", i, 0.9) for i in range(3)), *(result("b", i, 0.5, **lone) for i in range(3))])  # fmt: skip
    assert len(pairs.kept(CELL, "a", "b")) == 3


def test_other_work_beside_one_of_the_turns_is_left_out() -> None:
    results = [
        result("a", 0, 0.9), result("b", 0, 0.2, cores_elsewhere=0.5),
        result("a", 1, 0.3, cores_elsewhere=0.5), result("b", 1, 0.2, cores_elsewhere=0.45),
    ]  # fmt: skip
    pairs = Pairs(results)
    assert [a.pair for a, _ in pairs.kept(CELL, "a", "b")] == [1]
    assert sum(pairs.left_out(CELL, "a", "b").values()) == 1


def test_pairs_are_of_one_cell_and_whole() -> None:
    pairs = Pairs([result("a", 0, 0.9), result("b", 1, 0.9), result("b", 0, 0.9, cell=OTHER)])
    assert pairs.kept(CELL, "a", "b") == []
    assert not pairs.left_out(CELL, "a", "b")
