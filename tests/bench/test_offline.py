"""The offline bench: what it measures of any engine, medians, ratios, shares of limits, flags."""

from __future__ import annotations

import json
import random
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from offline import OfflineBenchmark, parse_args, summary
from scripted_server import ScriptedServer, scripted_server
from waiting import wait_until

from minserve.engine.batch import Scheduled
from minserve.engine.device.runner import ModelRunner
from minserve.models.finding.source import find_model, load_config
from minserve.models.weights.loader import open_checkpoint
from minserve.slo.objectives import StageTarget, Targets
from minserve.workload.answer import Answer, Ending
from minserve.workload.conversation import Turn
from minserve.workload.endpoint import Endpoint
from minserve.workload.server_process import ServerCommand
from minserve.workload.texts import estimate_tokens
from parts.offline import limits as offline_limits
from parts.offline import measure as offline_measure
from parts.offline import servers as offline_servers
from parts.offline.contenders import Contender, minserve_contenders, tensor_types
from parts.offline.engines import Minserve, Vllm
from parts.offline.limits import PASSES, MeasuredLimits, best, shares
from parts.offline.measure import BATCHES, MIXED_STEPS, PREFILL, Prompt, measure
from parts.offline.report import ROWS, best_of, medians, plot, ratios, share_table, table
from parts.offline.servers import STREAMS, RandomLoad, measure_server, mixed_rows, steady_rate
from shared.children import child, events, run_child
from shared.machine import INSTRUCTIONS, instructions, machine
from shared.prompt_texts import MARK_TOKENS

# A pass of n tokens that takes 1 ms and 0.01 ms per token.
BASE_S, TOKEN_S = 1e-3, 1e-5
LIMITS = MeasuredLimits(
    copy_gb_s=20.0,
    read_gb_s=10.0,
    weight_bytes=100e6,
    kv_bytes=10_000,
    linears_ms=dict.fromkeys(PASSES, 20.0),
)


class MadeUp:
    """An engine on a clock of its own, whose passes take `BASE_S` and `TOKEN_S` for each token."""

    version = "1"

    def __init__(self, runs_mixed: bool = True) -> None:
        self.runs_mixed = runs_mixed
        self.now = 0.0
        self.batches: list[tuple[int, int]] = []

    def _pass(self, num_tokens: int) -> None:
        self.now += BASE_S + TOKEN_S * num_tokens

    def generate(self, prompts: list[Prompt], tokens_out: int) -> None:
        self.batches.append((len(prompts), tokens_out))
        self._pass(sum(map(len, prompts)))
        for _ in range(tokens_out - 1):
            self._pass(len(prompts))

    def mixed(self, decodes: list[Prompt], prompts: list[Prompt]) -> float:
        return sum(BASE_S + TOKEN_S * (len(decodes) + len(prompt)) for prompt in prompts)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    engine = MadeUp()
    monkeypatch.setattr(offline_measure.time, "perf_counter", lambda: engine.now)
    return engine


def test_rates_are_those_of_an_engine_of_known_speed(made_up: MadeUp) -> None:
    rates = measure(made_up, 2)
    for batch in BATCHES:
        per_second = batch / (BASE_S + TOKEN_S * batch)
        assert rates[f"decode_b{batch}"] == pytest.approx([per_second] * 2)
    assert rates["prefill_1024"] == pytest.approx([PREFILL / (BASE_S + TOKEN_S * PREFILL)] * 2)
    assert rates["mixed_step"] == pytest.approx([1 / (BASE_S + TOKEN_S * (16 + 64))] * 2)


def test_an_engine_that_runs_no_mixed_steps_has_no_such_row(made_up: MadeUp) -> None:
    made_up.runs_mixed = False
    assert set(measure(made_up, 1)) == {*(f"decode_b{b}" for b in BATCHES), "prefill_1024"}


def test_every_repeat_is_told(made_up: MadeUp) -> None:
    told = []
    measure(made_up, 3, lambda: told.append(made_up.now))
    assert len(told) == 3
    assert all(earlier < later for earlier, later in pairwise(told))


def test_decodes_of_a_mixed_step_have_a_context_of_100_on_average(made_up: MadeUp) -> None:
    seen = []
    made_up.mixed = lambda decodes, prompts: seen.append((decodes, prompts)) or 1.0
    measure(made_up, 1)
    [(decodes, prompts)] = seen
    contexts = [len(decodes[0]) + step for step in range(len(prompts) + 1)]
    assert sum(contexts) / len(contexts) == 100
    assert (len(decodes), len(prompts), {len(p) for p in prompts}) == (16, MIXED_STEPS, {64})


def test_minserve_runs_a_prompt_with_all_decodes_in_each_mixed_step(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine: as many steps as prompts, and all decodes end with them."""
    driver = Minserve(Namespace(model=str(tiny_llama_dir), dtype="float32", quantization=None))
    batches: list[list[int]] = []
    launch = ModelRunner.launch

    def watched(runner: ModelRunner, batch: Sequence[Scheduled]) -> Any:
        batches.append(sorted(one.num_tokens for one in batch))
        return launch(runner, batch)

    monkeypatch.setattr(ModelRunner, "launch", watched)
    driver.mixed([[5] * 20] * 16, [[7] * 64] * 6)
    assert batches[16:] == [[1] * 16 + [64]] * 6


class StepAhead:
    """Stands in for vLLM's engine, whose next step begins before anybody hears of the last one.

    Attributes:
        steps: of each the requests that ran.
    """

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._running: list[str] = []
        self._inbox: list[str] = []
        self.steps: list[list[str]] = []

    def add_request(self, name: str, prompt: Any, params: dict[str, Any]) -> None:
        self._left[name] = params["max_tokens"]
        self._inbox.append(name)

    def step(self) -> list[Namespace]:
        done = self._running
        for name in done:
            self._left[name] -= 1
        if done:
            self.steps.append(done)
        self._running = [name for name in done if self._left[name]] + self._inbox
        self._inbox = []
        return [Namespace(request_id=name) for name in done]

    def has_unfinished_requests(self) -> bool:
        return any(self._left.values())


def test_vllm_runs_a_prompt_with_all_decodes_in_as_many_steps_as_there_are_prompts() -> None:
    driver, engine = Vllm.__new__(Vllm), StepAhead()
    driver._llm, driver._params, driver._num_added = Namespace(llm_engine=engine), dict, 0
    driver.mixed([[5] * 20] * 16, [[7] * 64] * 8)
    sizes = [len(step) for step in engine.steps]
    assert sizes == [16, 16, 18, *[17] * 6]


def test_limits_count_all_weights_that_a_pass_reads(tiny_llama_dir: Path) -> None:
    found = offline_limits.measured(str(tiny_llama_dir), "float32", None)
    source = find_model(str(tiny_llama_dir))
    config = load_config(source)
    with open_checkpoint(source) as checkpoint:
        read = sum(checkpoint.get(name).numel() for name in checkpoint.names())
    if not config.tie_word_embeddings:
        read -= config.vocab_size * config.hidden_size
    assert found["weight_bytes"] == 4 * read
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert found["kv_bytes"] == 4 * kv
    assert set(found["linears_ms"]) == set(PASSES)


def test_medians_are_over_the_repeats_of_all_turns() -> None:
    turns = [
        {"rates": {"decode_b1": [10.0, 30.0]}, "cold_first_token_s": 5.0, "peak_memory_gib": 1.0},
        {"rates": {"decode_b1": [20.0, 90.0, 40.0]}, "cold_first_token_s": 2.0,
         "peak_memory_gib": 3.0},
    ]  # fmt: skip
    assert medians(turns) == {
        "decode_b1": 30.0,
        "cold_first_token_s": 2.0,
        "peak_memory_gib": 3.0,
    }


def test_a_server_has_its_share_of_what_its_engine_does() -> None:
    turns = [{"rates": {"server_b32": [186.0], "decode_b32": [200.0]}}, {"rates": {}}]
    assert medians(turns)["server_b32_share"] == 0.93
    assert "server_b32_share" not in medians([{"rates": {"server_b32": [186.0]}}])


def test_the_best_of_variants_is_chosen_row_by_row() -> None:
    default = {"decode_b1": 30.0, "server_mixed_tpot_p50": 40.0}
    bound = {"decode_b1": 20.0, "server_mixed_tpot_p50": 25.0, "prefill_1024": 900.0}
    assert best_of([default, bound]) == {
        "decode_b1": 30.0,
        "prefill_1024": 900.0,
        "server_mixed_tpot_p50": 25.0,
    }


def test_a_ratio_above_1_is_better_whatever_the_row() -> None:
    ours = {"decode_b1": 30.0, "server_mixed_tpot_p50": 20.0, "mixed_step": 5.0}
    theirs = {"decode_b1": 20.0, "server_mixed_tpot_p50": 30.0, "prefill_1024": 1.0}
    assert ratios(ours, theirs) == {"decode_b1": 1.5, "server_mixed_tpot_p50": 1.5}


def test_the_slower_of_linears_and_streaming_is_the_limit() -> None:
    # 100 MB at 10 GB/s take 10 ms, 32 times 192 tokens' KV of 10 kB another 6.1 ms.
    assert LIMITS.streaming_ms("decode_b32") == pytest.approx(10 + 6.144)
    assert LIMITS.rate("decode_b32") == pytest.approx(32 / 0.020)
    assert LIMITS.bound_by("decode_b32") == "linears"
    slow = replace(LIMITS, read_gb_s=1.0)
    assert slow.rate("decode_b32") == pytest.approx(32 / 0.16144)
    assert slow.bound_by("decode_b32") == "streaming"
    assert LIMITS.rate("mixed_step") == pytest.approx(50.0)


def test_shares_are_of_the_rows_that_were_measured() -> None:
    found = shares({"decode_b1": 25.0, "server_b32": 7.0}, LIMITS)
    assert found == {"decode_b1": 0.5}
    assert "50%" in share_table(LIMITS.to_dict(), found)


def test_limits_of_two_measurements_are_the_fastest_of_both() -> None:
    first = {"copy_gb_s": 20.0, "read_gb_s": 8.0, "weight_bytes": 1e8, "kv_bytes": 1e4,
             "linears_ms": dict.fromkeys(PASSES, 20.0)}  # fmt: skip
    second = first | {
        "copy_gb_s": 10.0, "read_gb_s": 9.0, "linears_ms": dict.fromkeys(PASSES, 30.0) | {"decode_b1": 5.0},
    }  # fmt: skip
    found = best([first, second])
    assert (found.copy_gb_s, found.read_gb_s) == (20.0, 9.0)
    assert (found.linears_ms["decode_b1"], found.linears_ms["decode_b8"]) == (5.0, 20.0)


def test_a_steady_rate_leaves_out_when_not_all_streams_decode() -> None:
    first = [float(i) for i in range(11)]  # 0 to 10 s
    last = [4.0 + 0.5 * i for i in range(20)]  # 4 to 13.5 s
    # From 4 to 10 s: 6 tokens of the first, 12 of the last.
    assert steady_rate([first, last]) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="ended before"):
        steady_rate([[0.0, 1.0], [2.0, 3.0]])


def answer(due_s: float, times: list[float]) -> Answer:
    turn = Turn(slo=None, prompt_tokens=4, output_tokens=len(times))
    targets = Targets(ttft_s=1e6, stages=(StageTarget(tpot_s=float("inf")),))
    return Answer(turn, targets, due_s, sent_s=due_s, ending=Ending.DONE, token_times=times)


def test_rows_of_a_random_load_count_from_when_requests_were_due() -> None:
    rows = mixed_rows(
        [
            answer(0.0, [0.1, 0.2, 0.3]),
            answer(1.0, [1.2, 1.4, 1.6]),
            answer(1.0, [1.6, 1.8, 2.0]),
        ]
    )
    assert rows == pytest.approx(
        {
            "server_mixed": 9 / 2.0,
            "server_mixed_ttft_p50": 200.0,
            "server_mixed_ttft_mean": 300.0,
            "server_mixed_tpot_p50": 200.0,
            "server_mixed_tpot_mean": 500 / 3,
        }
    )
    assert set(rows) <= set(ROWS)


def test_a_random_load_is_the_same_for_every_server_and_begins_no_two_prompts_alike() -> None:
    load = RandomLoad(rate=4.0, seconds=5.0)
    drawn = load.draw(estimate_tokens)
    assert drawn == load.draw(estimate_tokens)
    assert len(drawn) == 20
    assert 0 <= drawn[0].arrival_s <= drawn[-1].arrival_s < 5.0
    texts = [one.turns[0].text for one in drawn]
    assert len({text[:6] for text in texts}) == 20
    assert all(76 - MARK_TOKENS <= estimate_tokens(text) + MARK_TOKENS <= 76 + 2 for text in texts)


@dataclass
class Scripted:
    """A scripted server as the bench sees one."""

    endpoint: Endpoint

    def failed(self, problem: str) -> SystemExit:
        return SystemExit(f"scripted {problem}")


@contextmanager
def in_place_of_real_ones(
    monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[ScriptedServer]:
    with scripted_server(**settings) as script:
        endpoint = Endpoint(script.url, "scripted")

        @contextmanager
        def started(variants: Sequence[ServerCommand]) -> Iterator[dict[str, Scripted]]:
            yield {one.label: Scripted(endpoint) for one in variants}

        monkeypatch.setattr(offline_servers, "started", started)
        yield script


def test_a_server_is_measured_with_full_batches_and_a_random_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = RandomLoad(rate=20.0, seconds=0.5, tokens_out=3)
    with in_place_of_real_ones(monkeypatch, usage="continuous", gap_s=0.002) as script:
        rows = measure_server(ServerCommand("scripted", []), load, 1, estimate_tokens)
    assert len(rows["server_b32"]) == 1
    assert set(rows) == {row for row in ROWS if row.startswith("server")} - {"server_b32_share"}
    lengths = [body["max_tokens"] for body in script.bodies]
    assert [lengths.count(n) for n in (16, 128, 3)] == [STREAMS, STREAMS, 10]
    assert not any("slo" in body for body in script.bodies)


def test_a_server_that_leaves_requests_unanswered_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offline_servers, "with_texts", lambda drawn, *_, **__: [
        replace(one, turns=(replace(one.turns[0], text="error"),)) for one in drawn
    ])  # fmt: skip
    with (
        in_place_of_real_ones(monkeypatch),
        pytest.raises(SystemExit, match="scripted did not answer everything"),
    ):
        measure_server(ServerCommand("scripted", []), RandomLoad(), 1, estimate_tokens)


def test_only_known_instructions_of_the_first_processor_count() -> None:
    text = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_tile\n\nflags\t\t: amx_bf16\n"
    assert instructions(text) == ["avx2", "avx512_bf16"]
    assert instructions("") == []
    assert set(machine()["instructions"]) <= set(INSTRUCTIONS)


def test_events_are_told_from_other_output() -> None:
    lines = ["INFO loading\n", '{"event": "rates", "rates": {}}\n', "{}\n"]
    assert list(events(lines)) == [{"event": "rates", "rates": {}}]


def test_a_child_reports_its_events_and_when_its_first_token_came() -> None:
    told = []
    code = (
        "import json\nprint('hello')\n"
        "for name in ('first token', 'repeat', 'rates'): print(json.dumps({'event': name}))"
    )
    found = run_child("it", [sys.executable, "-c", code], {}, told.append)
    assert [event["event"] for event in told] == ["first token", "repeat", "rates"]
    assert list(found["events"]) == ["first token", "repeat", "rates"]
    assert found["cold_first_token_s"] > 0


def test_a_child_that_fails_is_named_with_what_it_said() -> None:
    code = "import sys; sys.exit('no such model')"
    with pytest.raises(SystemExit, match=r"(?s)the engine failed.*no such model"):
        run_child("the engine", [sys.executable, "-c", code], {})


def test_processes_of_a_child_end_with_it() -> None:
    code = (
        "import subprocess, sys, time\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(one.pid, flush=True)\ntime.sleep(600)"
    )
    with child([sys.executable, "-c", code], {}) as (process, _):
        grandchild = int(process.stdout.readline())
        assert Path(f"/proc/{grandchild}").exists()
    assert process.returncode is not None
    status = Path(f"/proc/{grandchild}/status")

    def is_gone() -> bool:
        try:
            return "zombie" in status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(is_gone, "it was told to end, and lives")


def test_flags_choose_peers_quantized_weights_and_parts() -> None:
    args = parse_args(
        ["--peer", "vllm", "--peer", "llama.cpp", "--peer", "vllm", "--quantization", "int8",
         "--parts", "engine,limits"]
    )  # fmt: skip
    assert args.peer == ["vllm", "llama.cpp"]
    assert (args.quantization, args.parts) == (["int8"], ["engine", "limits"])
    assert parse_args([]).parts == ["engine", "server", "limits"]


@pytest.mark.parametrize(
    "flags", [["--repeats", "0"], ["--parts", "engine,speed"], ["--rate", "0"], ["--peer", "x"]]
)
def test_flags_that_mean_nothing_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert "error" in capsys.readouterr().err


def test_quantization_is_given_to_engine_and_server_only_where_asked_for() -> None:
    plain, quantized = minserve_contenders("smollm2", "auto", ["int8"], 2)
    assert (plain.label, quantized.label) == ("minserve", "minserve int8")
    for contender, given in ((plain, False), (quantized, True)):
        assert ("--quantization" in contender.command) is given
        assert ("--quantization" in contender.server.command) is given


def test_minserve_is_measured_first_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [Contender(label="minserve", weights="w", command=[])]
    peers = [
        Contender(label=label, weights="w", command=[], skipped=skipped)
        for label, skipped in (("vLLM default", {}), ("vLLM all cores", {}), ("llama.cpp", {"mixed_step": "why"}))
    ]  # fmt: skip
    speeds = {"minserve": 30.0, "vLLM default": 20.0, "vLLM all cores": 40.0, "llama.cpp": 60.0}
    order = []

    def measured(label: str, *_: object) -> dict[str, object]:
        order.append(label)
        rates = {"event": "rates", "rates": {"decode_b1": [speeds[label]]}}
        return {"events": {"first token": {"version": "1"}, "rates": rates}}

    monkeypatch.setattr("offline.run_child", measured)
    run = OfflineBenchmark(parse_args(["--parts", "engine"]))
    run.all(ours, peers)
    assert order == ["minserve", "vLLM default", "vLLM all cores", "llama.cpp", "minserve"]
    found = summary(run, ours, peers)
    assert {peer: one["decode_b1"] for peer, one in found["ratios"]["minserve"].items()} == {
        "vLLM": 0.75,
        "vLLM default": 1.5,
        "vLLM all cores": 0.75,
        "llama.cpp": 0.5,
    }
    assert found["skipped"] == {"llama.cpp": {"mixed_step": "why"}}
    json.dumps(found)


def test_without_peers_minserve_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(OfflineBenchmark, "_turn", lambda _, one, __: order.append(one.label))
    run = OfflineBenchmark(parse_args(["--parts", "engine"]))
    run.all([Contender(label="minserve", weights="w", command=[])], [])
    assert order == ["minserve"]


def test_tables_and_pictures_show_engines_with_different_rows(tmp_path: Path) -> None:
    rng = random.Random(0)
    full = {row: rng.uniform(1.0, 100.0) for row in ROWS}
    columns = {"minserve": full, "minserve int8": full, "llama.cpp": {"decode_b1": 3.0}}
    lines = table(columns).splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert lines[1].split()[-1] == "3.0"
    assert lines[2].split()[-1] == "-"
    assert "tok/s" in lines[1]
    assert "tok/s" not in table(columns, units=False)
    plot(columns, str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_the_types_of_a_gguf_file_are_named() -> None:
    assert tensor_types(str(find_model("smollm2").gguf_file)).startswith("Q4_1")
