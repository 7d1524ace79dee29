"""The comparison with vLLM: searches that are replayed, results that are kept, ratios."""

from __future__ import annotations

import pytest
from versus_report import OURS, PEER, Run, Search, Store, key, search, summary, table
from versus_runs import MARK_TOKENS, first_rate, marked

from minserve.workload.capacity import find_capacity
from minserve.workload.scenarios import SCENARIOS
from minserve.workload.texts import fill
from minserve.workload.zero_load import ZeroLoad

HOW = Search(start=1.0, repeats=2, tolerance=0.2)
SPEED = ZeroLoad(base_s=0.02, per_token_s=0.001, decode_s=0.03)


def run(server: str, rate: float, repeat: int, attainment: float, **fields: object) -> Run:
    """A finished run of chats."""
    rest = {
        "scenario": "chatbot", "attainment_mean": attainment, "cores_elsewhere": 0.0,
        "cores_server": 1.9, "cores_client": 0.1, "slowness": 1.0, "disturbed": False,
        "report": {"offered": 40},
    }  # fmt: skip
    return Run(server=server, rate=rate, repeat=repeat, attainment=attainment, **rest | fields)


def finish(store: Store, server: str, capacity: float) -> list[tuple[float, int]]:
    """Give a search what it asks for until it is complete; what it asked for."""
    asked = []
    while (wanted := search(store.of(server, "chatbot"), HOW)[1]) is not None:
        asked.append(wanted)
        rate, repeat = wanted
        store.add(run(server, rate, repeat, 1.0 if rate <= capacity else 0.5))
    return asked


def test_a_replayed_search_asks_for_what_a_plain_one_measures():
    measured = []

    def measure(rate: float, repeat: int) -> float:
        measured.append((rate, repeat))
        return 1.0 if rate <= 3.0 else 0.5

    plain = find_capacity(measure, HOW.start, repeats=HOW.repeats, tolerance=HOW.tolerance)
    store = Store({})
    assert finish(store, "a", 3.0) == measured
    replayed, _ = search(store.of("a", "chatbot"), HOW)
    assert replayed.complete
    assert replayed.rate == plain.rate


def test_an_interrupted_search_goes_on_with_the_run_it_lacks(tmp_path):
    file = tmp_path / "results.json"
    store = Store.open({"seed": 0, "scenarios": ("chatbot",)}, file)
    store.speed = {"base_s": 0.02, "per_token_s": 0.001, "decode_s": 0.03}
    asked = finish(store, "a", 3.0)
    store.runs = store.runs[:3]
    store.save()
    again = Store.open({"seed": 0, "scenarios": ("chatbot",)}, file)
    assert again.runs == store.runs
    assert again.speed == store.speed
    assert finish(again, "a", 3.0) == asked[3:]


def test_results_of_other_settings_are_refused(tmp_path):
    file = tmp_path / "results.json"
    Store.open({"lengths": 0.1}, file).save()
    with pytest.raises(SystemExit, match="other settings"):
        Store.open({"lengths": 0.2}, file)


def test_the_ratio_is_to_the_best_of_the_peers_variants():
    store = Store({})
    for server, capacity in (
        ("ours", 4.0),
        ("ours + drafts", 8.0),
        ("vLLM", 1.0),
        ("vLLM 512", 2.0),
    ):
        finish(store, server, capacity)
    systems = {"ours": OURS, "ours + drafts": OURS, "vLLM": PEER, "vLLM 512": PEER}
    result = summary(store, systems, {"chatbot": HOW})
    found = result["scenarios"]["chatbot"]
    assert result["ratio"] == found["ours"]["ratio"] == pytest.approx(2.0, rel=0.1)
    assert result["ratios"]["ours + drafts"] == pytest.approx(4.0, rel=0.1)
    assert "ratio" not in found["vLLM 512"]
    assert "2.0" in table(result)


def test_there_is_no_ratio_where_a_capacity_is_unknown():
    store = Store({})
    store.add(run("ours", 1.0, 0, 1.0))
    store.add(run("vLLM", 1.0, 0, 0.1))
    result = summary(store, {"ours": OURS, "vLLM": PEER}, {"chatbot": HOW})
    assert result["ratio"] is None
    assert result["scenarios"]["chatbot"]["vLLM"]["capacity"] is None


def test_rates_have_one_name_whatever_their_rounding():
    assert key(0.1 + 0.2) == key(0.3)


def test_no_two_runs_send_a_prompt_that_begins_alike():
    scenario = SCENARIOS["tools"].scaled(0.1)
    workload = fill(scenario.draw(2.0, seed=0, seconds=20.0), seed=0)
    texts = [
        one.turns[0].text[: MARK_TOKENS - 1]
        for salt in ("1 0 0", "1 0 1", "2 0 0")
        for one in marked(workload, salt)
    ]
    assert len(set(texts)) == len(texts)
    again = marked(workload, "1 0 0")
    assert again == marked(workload, "1 0 0")
    assert [one.turns[1:] for one in again] == [one.turns[1:] for one in workload]


def test_searches_begin_at_one_request_after_the_other():
    scenario = SCENARIOS["chatbot"].scaled(0.1)
    seconds = 0.02 + 0.001 * scenario.mean_prompt_tokens + 0.03 * scenario.mean_output_tokens
    assert first_rate(scenario, SPEED) == pytest.approx(1 / seconds, rel=0.01)
