"""GET /metrics against what the requests really did, read by prometheus_client's own parser."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from live_server import RunningServer, hanging, post, request_bytes
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

from minserve.errors import ConfigError
from minserve.request import FinishReason
from minserve.server.app import Server
from minserve.server_config import ServerConfig
from minserve.slo.attainment import Outcome
from minserve.slo.task_table import TaskOutcome

CONTRACT = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "num_requests_unfinished": "gauge",
    "kv_cache_usage_perc": "gauge",
    "profile_completeness": "gauge",
    "asyncio_tasks": "gauge",
    "slo_attainment": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "surplus_tokens": "counter",
    "request_success": "counter",
    "plans_ahead": "counter",
    "failed_batches": "counter",
    "planner_fallbacks": "counter",
    "spec_decode_num_drafts": "counter",
    "spec_decode_num_draft_tokens": "counter",
    "spec_decode_num_accepted_tokens": "counter",
    "spec_decode_num_accepted_tokens_per_pos": "counter",
    "slo_requests": "counter",
    "tasks": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "iteration_seconds": "histogram",
    "iteration_predicted_seconds": "histogram",
    "iteration_profiled_seconds": "histogram",
    "iteration_surprise": "histogram",
    "planning_seconds": "histogram",
    "batch_tokens": "histogram",
}
# What every Prometheus client tells of its process.
PROCESS = {
    "process_virtual_memory_bytes": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
    "process_cpu_seconds": "counter",
    "process_open_fds": "gauge",
    "process_max_fds": "gauge",
}
PROMPT = "The quick brown fox jumps over the lazy dog while the rain in Spain stays mainly"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
LONG = {**GREEDY, "max_tokens": 400}
# Whatever was said is said again, so that even a random model is easy to foresee.
REPETITIVE = {**GREEDY, "prompt": "The rain " * 9, "max_tokens": 64, "frequency_penalty": -2}
GENEROUS = {"ttft_ms": 60_000, "tpot_ms": 10_000}
IMPOSSIBLE = {"ttft_ms": 60_000, "tpot_ms": 0.001}

# A metric's name without the prefix, and its labels, as in "request_success_total stop".
Samples = dict[str, float]


def scrape(server: RunningServer) -> Samples:
    status, headers, raw = post(server, "/metrics", None, method="GET")
    assert status == 200, raw
    assert headers["Content-Type"].startswith("text/plain; version=")
    return {
        " ".join([sample.name.removeprefix("minserve:"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(raw.decode())
        for sample in family.samples
    }


def since(before: Samples, server: RunningServer) -> Samples:
    """What has changed, by how much."""
    after = scrape(server)
    assert set(before) <= set(after)
    return {name: after[name] - before.get(name, 0) for name in after}


def ask(server: RunningServer, **fields: Any) -> dict[str, Any]:
    status, _, raw = post(server, "/v1/completions", {**GREEDY, **fields})
    assert status == 200, raw
    return json.loads(raw)


def wait_for(server: RunningServer, holds: Callable[[Samples], bool]) -> Samples:
    return wait_until(lambda: samples if holds(samples := scrape(server)) else None)


@pytest.fixture
def plain(tiny_llama_dir: Path, start_server: Callable[..., RunningServer]) -> RunningServer:
    """A server of its own, that neither promises nor drafts."""
    return start_server(tiny_llama_dir, ServerConfig(), policy="sarathi")


# --- the text ---


def test_the_metrics_are_those_of_the_contract(server: RunningServer) -> None:
    ask(server, slo=GENEROUS)
    _, _, raw = post(server, "/metrics", None, method="GET")
    families = list(text_string_to_metric_families(raw.decode()))
    expected = {f"minserve:{name}": kind for name, kind in CONTRACT.items()} | PROCESS
    assert {f.name: f.type for f in families} == expected
    for family in families:
        assert family.documentation
        assert family.samples


def test_the_tasks_of_connections_end_with_them(plain: RunningServer) -> None:
    def tasks() -> float:
        return scrape(plain)["asyncio_tasks"]

    before = tasks()
    crowd = [plain.connect() for _ in range(20)]
    wait_until(lambda: tasks() >= before + 20)
    for sock in crowd:
        sock.close()
    wait_until(lambda: tasks() <= before)


def test_counters_end_in_total_and_labels_come_from_fixed_sets(plain: RunningServer) -> None:
    classes = {"custom", *plain.engine.slo_classes}
    fixed = {
        "finished_reason": {reason.value for reason in FinishReason},
        "outcome": {
            *("launched", "held", "discarded"),
            *(outcome.value for outcome in (*Outcome, *TaskOutcome)),
        },
        "class": classes,
        "kind": {"prefill", "decode", "draft"},
        "reason": {"error", "hang", "invalid", "out_of_memory", "rest"},
        "position": {str(place) for place in range(plain.engine.config.max_speculation)},
    }
    _, _, raw = post(plain, "/metrics", None, method="GET")
    seen: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(raw.decode()):
        for sample in family.samples:
            assert family.type != "counter" or sample.name == f"{family.name}_total"
            for label, value in sample.labels.items():
                seen.setdefault(label, set()).add(value)
    assert seen.pop("le")
    # All are there from the start, so that a rate sees the first of each.
    assert seen == fixed


def test_buckets_rise_to_the_count(plain: RunningServer) -> None:
    ask(plain)
    _, _, raw = post(plain, "/metrics", None, method="GET")
    for family in text_string_to_metric_families(raw.decode()):
        if family.type != "histogram":
            continue
        series: dict[str, list[float]] = {}
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                series.setdefault(sample.labels.get("kind", ""), []).append(sample.value)
        counts = {s.labels.get("kind", ""): s.value for s in family.samples if "_count" in s.name}
        assert {kind: values[-1] for kind, values in series.items()} == counts
        assert all(values == sorted(values) for values in series.values())


# --- counts ---


def test_tokens_and_finishes_are_those_of_the_usages(plain: RunningServer) -> None:
    before = scrape(plain)
    counted = {n: v for n, v in before.items() if "_count" in n or "_total" in n}
    assert not any(v for n, v in counted.items() if not n.startswith("process_"))
    answers = [ask(plain), ask(plain, prompt=["a b c", "The rain"], n=2, max_tokens=7)]
    text = answers[0]["choices"][0]["text"]
    answers.append(ask(plain, stop=text[len(text) // 2 :][:3]))
    assert answers[2]["choices"][0]["finish_reason"] == "stop"
    answers.append(ask(plain, max_tokens=1))
    now = since(before, plain)
    choices = [choice for answer in answers for choice in answer["choices"]]
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    prompted = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert len(choices) == 7
    assert now["generation_tokens_total"] == generated
    assert now["prompt_tokens_total"] == prompted
    assert now["request_success_total stop"] == 1
    assert now["request_success_total length"] == 6
    assert now["request_success_total abort"] == now["request_success_total error"] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert now[f"{name}_seconds_count"] == len(choices)
    for name in ("request_prefill_time", "request_decode_time"):
        assert now[f"{name}_seconds_count"] == len(choices)
    assert now["request_generation_tokens_sum"] == generated
    assert now["request_prompt_tokens_count"] == len(choices)
    assert now["inter_token_latency_seconds_count"] == generated - len(choices)
    # What lies within what, on the engine's one clock.
    first, gaps = now["time_to_first_token_seconds_sum"], now["inter_token_latency_seconds_sum"]
    assert 0 < now["request_queue_time_seconds_sum"] <= first
    prefill, decode = (now[f"request_{one}_time_seconds_sum"] for one in ("prefill", "decode"))
    assert 0 < prefill <= first
    assert decode == pytest.approx(gaps)
    assert first + gaps <= now["e2e_request_latency_seconds_sum"] + 1e-6
    assert now["num_requests_running"] == now["num_requests_waiting"] == 0


def test_iterations_and_their_tokens(plain: RunningServer) -> None:
    before = scrape(plain)
    usage = ask(plain)["usage"]
    now = since(before, plain)
    assert now["batch_tokens_sum prefill"] == usage["prompt_tokens"]
    assert now["batch_tokens_sum decode"] == usage["completion_tokens"] - 1
    assert now["batch_tokens_sum draft"] == 0
    # One request alone: its prefill, and then a token each.
    for name in ("seconds", "predicted_seconds", "profiled_seconds", "surprise"):
        assert now[f"iteration_{name}_count"] == usage["completion_tokens"]
    for kind in ("prefill", "decode", "draft"):
        assert now[f"batch_tokens_count {kind}"] == usage["completion_tokens"]
    assert now["planning_seconds_count"] >= now["iteration_seconds_count"]
    assert now["planning_seconds_sum"] > 0
    assert now["iteration_seconds_sum"] > 0
    assert now["iteration_predicted_seconds_sum"] > 0
    assert now["iteration_profiled_seconds_sum"] > 0


def test_a_repeated_prompt_hits_the_prefix_cache(plain: RunningServer) -> None:
    before = scrape(plain)
    usages = [ask(plain, prompt=PROMPT * 3)["usage"] for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0 < cached[1]
    now = since(before, plain)
    assert now["prefix_cache_queries_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert now["prefix_cache_hits_total"] == cached[1]
    assert now["batch_tokens_sum prefill"] == now["prompt_tokens_total"] - cached[1]


def test_preemptions_are_counted(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(), policy="sarathi", num_blocks=24)
    answer = ask(server, prompt=["The rain", "a b c d"], max_tokens=300)
    now = scrape(server)
    assert now["num_preemptions_total"] == server.engine._core.planner.num_preemptions > 0
    # Whoever comes back has been asked before: no second first token, no second waiting time.
    assert now["time_to_first_token_seconds_count"] == 2
    assert now["request_queue_time_seconds_count"] == 2
    assert now["prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    assert now["generation_tokens_total"] == answer["usage"]["completion_tokens"] == 600
    # Nor does it find a prefix: what it finds are its own tokens.
    assert now["prefix_cache_queries_total"] == answer["usage"]["prompt_tokens"]
    assert now["prefix_cache_hits_total"] == 0


def test_with_vllms_prefix_its_dashboard_finds_what_it_asks_for(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    config = ServerConfig(metrics_prefix="vllm", served_model_name='a "model"')
    server = start_server(tiny_llama_dir, config)
    ask(server)
    _, _, raw = post(server, "/metrics", None, method="GET")
    samples = [s for f in text_string_to_metric_families(raw.decode()) for s in f.samples]
    # Those of the process have no model.
    own = [s for s in samples if not s.name.startswith(("process_", "vllm:asyncio_tasks"))]
    assert all(sample.name.startswith("vllm:") for sample in own)
    assert {sample.labels["model_name"] for sample in own} == {'a "model"'}
    # Panels of vLLM's example for Grafana.
    asked = {
        *("num_requests_running", "num_requests_waiting"),
        *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
        *("e2e_request_latency_seconds_bucket", "time_to_first_token_seconds_bucket"),
        *("request_prompt_tokens_bucket", "request_generation_tokens_bucket"),
        *("request_queue_time_seconds_sum", "request_prefill_time_seconds_sum"),
        "request_decode_time_seconds_sum",
    }
    assert {f"vllm:{name}" for name in asked} <= {sample.name for sample in samples}


@pytest.mark.parametrize("prefix", ["", "v llm", "vllm:", "1st", "vllm\n", "é"])
def test_a_prefix_that_is_no_name_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="metrics_prefix"):
        ServerConfig(metrics_prefix=prefix)


# --- a busy server ---


def test_gauges_while_requests_run_and_wait(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(), policy="sarathi", max_num_seqs=1)
    with hanging(server, after=5), server.connect() as sock:
        sock.sendall(request_bytes("/v1/completions", {**LONG, "n": 3}))
        busy = wait_for(server, lambda now: now["num_requests_running"] == 1)
        assert busy["num_requests_waiting"] == 2
        assert 0 < busy["kv_cache_usage_perc"] < 1
    server.wait_until_free()
    idle = scrape(server)
    assert idle["num_requests_running"] == idle["num_requests_waiting"] == 0
    assert idle["kv_cache_usage_perc"] == 0


def test_an_aborted_request_is_no_success_and_has_no_latency(plain: RunningServer) -> None:
    with hanging(plain, after=5):
        with plain.connect() as sock:
            sock.sendall(request_bytes("/v1/completions", {**LONG, "n": 2, "stream": True}))
            wait_for(plain, lambda now: now["generation_tokens_total"] > 2)
        plain.wait_until_left()
    plain.wait_until_free()
    now = scrape(plain)
    assert now["request_success_total abort"] == 2
    assert now["request_success_total length"] == 0
    assert now["e2e_request_latency_seconds_count"] == 0
    assert now["time_to_first_token_seconds_count"] == 2


def test_an_aborted_request_counts_against_its_slo_only_where_it_was_late(
    plain: RunningServer,
) -> None:
    for slo, late in ((GENEROUS, 0), ({"ttft_ms": 0.001}, 1)):
        seen = scrape(plain)["generation_tokens_total"]
        with hanging(plain, after=5):
            with plain.connect() as sock:
                sock.sendall(request_bytes("/v1/completions", {**LONG, "slo": slo, "stream": True}))
                wait_for(plain, lambda now, seen=seen: now["generation_tokens_total"] > seen + 2)
            plain.wait_until_left()
        plain.wait_until_free()
        now = scrape(plain)
        counted = {k: v for k, v in now.items() if k.startswith("slo_requests_total") and v}
        assert counted == ({"slo_requests_total custom best_effort": 1} if late else {})
        assert now.get("slo_attainment custom") == (0 if late else None)


def test_what_the_planner_refuses_ends_in_an_error(server: RunningServer) -> None:
    before = scrape(server)
    slo = {**IMPOSSIBLE, "on_unattainable": "reject"}
    assert post(server, "/v1/completions", {**GREEDY, "slo": slo, "n": 2})[0] == 429
    now = since(before, server)
    assert now["slo_requests_total custom rejected"] == 2
    assert now["request_success_total error"] == 2
    assert now["time_to_first_token_seconds_count"] == 0
    assert now["prompt_tokens_total"] == 0


# --- SLOs ---


def test_slos_by_class_and_outcome(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(), slo_classes=str(_classes(tiny_llama_dir)))
    ask(server)
    for slo in ("house", "house", "hopeless", {"class": "house", "ttft_ms": 50_000}):
        ask(server, slo=slo)
    now = scrape(server)
    counted = {
        name.removeprefix("slo_requests_total "): value
        for name, value in now.items()
        if name.startswith("slo_requests_total") and value
    }
    assert counted == {"house attained": 2, "hopeless best_effort": 1, "custom attained": 1}
    shares = {name: value for name, value in now.items() if name.startswith("slo_attainment")}
    assert shares == {
        "slo_attainment house": 1,
        "slo_attainment hopeless": 0,
        "slo_attainment custom": 1,
    }


def _classes(folder: Path) -> Path:
    path = folder.parent / "metrics-classes.toml"
    path.write_text(
        "[house]\nttft_ms = 60000\ntpot_ms = 10000\n\n[hopeless]\nttft_ms = 60000\ntpot_ms = 0.001\n"
    )
    return path


# --- speculation ---


def test_drafts_are_counted_as_the_engine_counts_them(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(
        tiny_llama_dir, ServerConfig(), policy="sarathi", speculator="ngram", max_speculation=4
    )
    usage = ask(server, **REPETITIVE, include_acceptance=True)["usage"]
    now, counts = scrape(server), server.engine._core.stats.speculation
    assert 0 < counts.num_accepted_tokens < counts.num_draft_tokens
    assert now["spec_decode_num_drafts_total"] == counts.num_drafts
    assert now["spec_decode_num_draft_tokens_total"] == counts.num_draft_tokens
    assert now["spec_decode_num_accepted_tokens_total"] == counts.num_accepted_tokens
    per_position = [
        now[f"spec_decode_num_accepted_tokens_per_pos_total {place}"] for place in range(4)
    ]
    assert per_position == counts.num_accepted_per_pos
    assert sum(per_position) == counts.num_accepted_tokens
    assert not [name for name in now if re.fullmatch(r".*per_pos_total 4", name)]
    assert usage["acceptance"]["draft_tokens"] == counts.num_draft_tokens
    assert usage["acceptance"]["accepted_tokens"] == counts.num_accepted_tokens
    assert now["batch_tokens_sum draft"] == counts.num_draft_tokens
    # A delivery may bring several tokens; the gap before it is one gap.
    assert now["generation_tokens_total"] == usage["completion_tokens"] == 64
    assert now["inter_token_latency_seconds_count"] < 63


# --- who may ask, and when ---


def test_two_servers_of_one_process_count_apart(
    tiny_llama_dir: Path, plain: RunningServer, start_server: Callable[..., RunningServer]
) -> None:
    other = start_server(tiny_llama_dir, ServerConfig(), policy="fcfs")
    ask(plain)
    assert scrape(plain)["generation_tokens_total"] == 24
    assert scrape(other)["generation_tokens_total"] == 0


def test_the_metrics_need_no_key_as_health_needs_none(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(api_key=("secret",)), policy="sarathi")
    assert post(server, "/v1/models", None, method="GET")[0] == 401
    assert scrape(server)["num_requests_running"] == 0
    assert post(server, "/metrics", {})[0] == 405


def test_while_the_model_loads_there_are_no_metrics() -> None:
    async def answer() -> int:
        runner = Server(ServerConfig()).create_runner()
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
            async with ClientSession() as session, session.get(url) as response:
                return response.status
        finally:
            await runner.cleanup()

    assert asyncio.run(answer()) == 503
