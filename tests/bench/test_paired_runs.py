"""Comparisons from end to end: scripted servers are driven in turns, and tables come out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import policies
import pytest
import versus_vllm
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
    estimate_s,
    open_store,
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


# --- flags ---


def test_without_a_name_results_are_kept_under_one_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired_runs, "CACHE", tmp_path / "peers")
    args = policies.parse_args([])
    store = open_store(args, "policies", {}, ["dp", "edf"], "smollm2")
    assert store.file is not None
    assert store.file.parent == tmp_path / "bench"
    args = policies.parse_args(["--results", str(store.file)])
    with pytest.raises(SystemExit, match="--resume"):
        open_store(args, "policies", {}, ["dp", "edf"], "smollm2")
    args = policies.parse_args(["--resume", str(store.file)])
    assert open_store(args, "policies", {}, ["dp", "edf"], "smollm2").results == []
    args = policies.parse_args(["--resume", str(store.file), "--seed", "1"])
    with pytest.raises(SystemExit, match="other settings: seed"):
        open_store(args, "policies", {}, ["dp", "edf"], "smollm2")


def test_slos_may_be_meant_by_an_idle_speed_from_a_file(tmp_path: Path) -> None:
    idle = tmp_path / "idle.json"
    Reference.now(ZeroLoad(0.02, 0.001, 0.03), "smollm2", "somebody").save(idle)
    flags = ["--zero-load", str(idle), "--results"]
    args = policies.parse_args([*flags, str(tmp_path / "a.json")])
    store = open_store(args, "policies", {}, ["dp"], "smollm2")
    assert store.reference == Reference.load(idle)
    args = policies.parse_args([*flags, str(tmp_path / "b.json")])
    with pytest.raises(SystemExit, match="not of 'other'"):
        open_store(args, "policies", {}, ["dp"], "other")


def test_cells_are_those_of_the_flags() -> None:
    cells = policies.cells_of(policies.parse_args([]))
    assert len(cells) == 2 * 3 * 4 * 2
    assert [cell.busy for cell in cells] == [False] * 24 + [True] * 24
    assert all(cell.loose == 2 * cell.tight for cell in cells)
    quick = policies.cells_of(policies.parse_args(["--quick"]))
    assert [cell.rate for cell in quick] == [1.5, 6.0]
    told = versus_vllm.parse_args(["--rates", "mixed=2,1", "reasoning=3", "--scenarios", "mixed"])
    assert [(cell.scenario, cell.rate) for cell in versus_vllm.cells_of(told)] == [
        ("mixed", 1.0),
        ("mixed", 2.0),
    ]
    assert len(versus_vllm.cells_of(versus_vllm.parse_args([]))) == 7


@pytest.mark.parametrize(
    "flags", [["--rates", "dance=3"], ["--rates", "mixed"], ["--rates", "mixed=0"],
              ["--scenarios", "reasoning"]],
)  # fmt: skip
def test_senseless_rates_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        versus_vllm.parse_args(flags)


@pytest.mark.parametrize(
    "flags", [["--policies", "edf"], ["--policies", "dp,lifo"], ["--beside", "wind"],
              ["--rates", "0"], ["--tight", "0.5"], ["--scenarios", "dance"]],
)  # fmt: skip
def test_senseless_cells_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        policies.parse_args(flags)


def test_the_estimate_grows_with_the_turns() -> None:
    short, long = (estimate_s(n, EFFORT, 2, 10.0) for n in (10, 20))
    assert long - short == pytest.approx(10 * (EFFORT.seconds + paired_runs.TURN_EXTRA_S))


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
