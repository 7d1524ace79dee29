"""Comparisons from end to end: scripted servers are driven in turns, and tables come out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from paired import CELL, result
from scripted_server import ScriptedServer, scripted_server

from minserve.workload import client
from minserve.workload.endpoint import Endpoint
from minserve.workload.reference import Reference
from minserve.workload.scenarios import SCENARIOS
from minserve.workload.texts import estimate_tokens, fill
from minserve.workload.zero_load import ZeroLoad
from parts.policies.report import summary as policies_summary
from parts.policies.report import table as policies_table
from parts.versus_vllm.report import plot, summary, table
from shared.cpu_time import Watch, busy_process
from shared.paired import runs as paired_runs
from shared.paired.runs import (
    Effort,
    PairedBenchmark,
    best_of,
    best_reference,
)
from shared.paired.turns import Cell, Pairs, TurnStore
from shared.prompt_texts import MARK_TOKENS, marked
from shared.servers import profiled_minserve, started

EFFORT = Effort(seconds=0.3, pairs=2, lengths=0.01, seed=0, rounds=1)
# Of which twice and four times are kept by any server.
REFERENCE = Reference.now(ZeroLoad(500.0, 0.1, 200.0), "scripted", "nobody")
CELLS = [
    Cell(scenario="chatbot", rate=10.0, tight=2.0, loose=4.0),
    Cell(scenario="chatbot", rate=20.0, tight=2.0, loose=4.0, busy=True),
]


@dataclass
class Scripted:
    """A scripted server as the comparisons see one."""

    script: ScriptedServer
    endpoint: Endpoint

    def cpu_seconds(self) -> float:
        return 0.0

    def failed(self, problem: str) -> SystemExit:
        return SystemExit(f"scripted {problem}")

    @property
    def prompts(self) -> list[str]:
        """Those that it was sent, without lone ones."""
        told = [body["prompt"] for body in self.script.bodies]
        return sorted(one for one in told if one != "Once upon a")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Scripted]]:
    monkeypatch.setattr(paired_runs, "WARM_UP_S", 0.1)
    monkeypatch.setattr(paired_runs, "SETTLE_S", 0.0)
    monkeypatch.setattr(paired_runs, "await_quiet", lambda: None)
    monkeypatch.setattr(client, "POLL_S", 0.01)  # several requests to a lone server in each turn
    with ExitStack() as stack:
        found = {}
        for label in ("dp", "edf"):
            script = stack.enter_context(scripted_server(gap_s=0.001))
            found[label] = Scripted(script, Endpoint(script.url, "scripted"))
        yield found


def bench(store: TurnStore, servers: dict[str, Scripted]) -> PairedBenchmark:
    return PairedBenchmark(EFFORT, store, servers, estimate_tokens)


def test_servers_get_the_same_requests_in_turns_and_reports_come_out(
    servers: dict[str, Scripted], tmp_path: Path
) -> None:
    store = TurnStore({"seed": 0}, tmp_path / "results.json", REFERENCE)
    assert bench(store, servers).run(CELLS)
    assert [one.system for one in store.results] == ["dp", "edf", "edf", "dp"] * 2
    assert all(one.attainment == 1.0 for one in store.results)
    # Warming up has other requests for each, and every turn the same ones for both.
    first, second = (set(servers[label].prompts) for label in ("dp", "edf"))
    offered = sum(one.report["offered"] for one in store.results if one.system == "dp")
    assert offered == len(first & second) == 2 * (3 + 6)
    assert len(first - second) == len(second - first) == 1
    assert all(one.lone_s > 0 for one in store.results)

    pairs = Pairs(store.results)
    versus = json.loads(json.dumps(summary(pairs, CELLS, "dp", ["edf"]), allow_nan=False))
    assert len(versus["peers"]["edf"]["scenarios"]) == 2
    assert "beside edf" in table(versus)
    plot(pairs, CELLS, "dp", ["edf"], str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    planners = json.loads(
        json.dumps(policies_summary(pairs, CELLS, ["dp", "edf"]), allow_nan=False)
    )
    assert planners["below"] == planners["above"] == []
    assert "below beyond the spread in 0 of 2 cells" in policies_table(planners)


def test_an_interrupted_comparison_is_kept_and_gone_on_with(
    servers: dict[str, Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    store = TurnStore({"seed": 0}, file, REFERENCE)
    add, added = TurnStore.add, []

    def interrupt(self: TurnStore, one: object) -> None:
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(one)
        add(self, one)

    with monkeypatch.context() as patch:
        patch.setattr(TurnStore, "add", interrupt)
        assert not bench(store, servers).run(CELLS)
    again = TurnStore.resume(file, {"seed": 0}, ["dp", "edf"])
    assert len(again.results) == 2
    assert bench(again, servers).run(CELLS)
    assert len(again.results) == 8
    assert len(TurnStore.resume(file, {"seed": 0}, ["dp", "edf"]).results) == 8


def test_a_server_that_answers_no_lone_request_ends_the_comparison(
    servers: dict[str, Scripted],
) -> None:
    broken = replace(servers["edf"], endpoint=Endpoint("http://127.0.0.1:9", "scripted"))
    with pytest.raises(SystemExit, match="lone request"):
        bench(TurnStore({}, None, REFERENCE), {"edf": broken}).run(CELLS)


def test_the_reference_is_the_better_of_the_servers(servers: dict[str, Scripted]) -> None:
    servers["dp"].script.gap_s = 0.01
    found = best_reference(servers, 1)
    assert "tokens of edf" in found.server
    assert found.model == "scripted"
    slow_prompts, slow_tokens = ZeroLoad(1.0, 0.01, 0.01), ZeroLoad(0.1, 0.001, 0.1)
    best = best_of([("x", slow_prompts), ("y", slow_tokens)], "m")
    assert best.speed == ZeroLoad(0.1, 0.001, 0.01)
    assert best.server == "prompts of y, tokens of x"


def test_a_busy_process_ends_with_its_turn() -> None:
    with busy_process() as process:
        assert process.is_running()
    assert not process.is_running()


def test_no_two_turns_send_a_prompt_that_begins_alike() -> None:
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


# --- what is found ---


def test_dp_is_compared_with_the_simple_policy_that_is_nearest() -> None:
    shares = {"dp": 0.8, "edf": 0.9, "fcfs": 0.5}
    turns = [result(one, i, share + 0.001 * i) for one, share in shares.items() for i in range(3)]
    found = policies_summary(Pairs(turns), [CELL], list(shares))
    assert found["below"] == [CELL.name]
    assert found["above"] == []
    cell = found["cells"][CELL.name]
    assert cell["best_simple"] == "edf"
    assert cell["difference"]["mean"] == pytest.approx(-0.1)
    assert cell["policies"]["fcfs"]["attainment"] == pytest.approx(0.501)
    assert cell["policies"]["fcfs"]["spread"] == pytest.approx(0.001)
    assert CELL.name in policies_table(found)


def test_what_was_left_out_is_told_with_its_reason() -> None:
    turns = [result("dp", 0, 0.9, cores_elsewhere=0.9), result("edf", 0, 0.8)]
    words = "beside whose turns other work differs by over 0.15 cores: 1 (other work"
    assert words in policies_table(policies_summary(Pairs(turns), [CELL], ["dp", "edf"]))
    assert words in table(summary(Pairs(turns), [CELL], "dp", ["edf"]))


def test_cells_that_were_not_measured_stand_empty() -> None:
    found = policies_summary(Pairs([]), [CELL], ["dp", "edf"])
    assert json.dumps(found, allow_nan=False)
    assert CELL.name in policies_table(found)
    versus = summary(Pairs([]), [CELL], "dp", ["edf"])
    assert json.dumps(versus, allow_nan=False)
    assert "no pairs" in table(versus)


# --- processes ---


def test_a_server_is_started_watched_and_stopped(tiny_llama_dir: Path) -> None:
    flags = ["--model", str(tiny_llama_dir), "--device", "cpu", "--dtype", "float32", "--threads",
             "1", "--num-blocks", "300", "--profile-seconds", "0.5"]  # fmt: skip
    with started([profiled_minserve("tiny", *flags)]) as servers:
        server = servers["tiny"]
        watch = Watch(servers, "tiny")
        assert server.endpoint.takes_slo
        assert server.cpu_seconds() > 0
        assert watch.cores().idle == 0
    assert server.cpu_seconds() == 0
