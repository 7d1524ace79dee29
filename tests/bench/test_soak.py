"""How a soak's samples are judged: on series that are made."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from parts.soak.analysis import Sample, after_warm_up, grew, growth_pct, summary
from parts.soak.watching import gauges

FLAT = Sample(at_s=0.0, rss_mib=1000.0, fds=40, sockets=5, threads=12, tasks=3, busy={})
MINUTES = 20


def made(rss_pct: float = 0.0, fds: float = 0.0, noise: float = 0.0) -> list[Sample]:
    """Samples of 20 minutes, one each 30 s, in which things grow steadily."""
    rng = random.Random(0)
    samples = []
    for i in range(2 * MINUTES + 1):
        share = i / (2 * MINUTES)
        rss = 1000.0 * (1 + rss_pct / 100 * share) + rng.uniform(-noise, noise)
        probes = tuple(0.3 + rng.uniform(0, 0.01) for _ in range(5))
        samples.append(
            replace(FLAT, at_s=30.0 * i, rss_mib=rss, fds=40 + int(fds * i), probe_s=probes)
        )
    return samples


def test_a_flat_run_leaks_nothing() -> None:
    samples = made(noise=5.0)
    found = summary(samples, samples)
    assert found["leaks"] == 0
    assert found["leaked"] == []
    assert found["rss_growth_pct"] == pytest.approx(0.0, abs=0.5)
    assert found["latency_drift"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("pct", [2.0, 10.0, -5.0])
def test_growth_is_that_after_the_warm_up(pct: float) -> None:
    samples = made(rss_pct=pct, noise=1.0)
    # The first quarter of the time, and its growth, do not count.
    assert summary(samples, samples)["rss_growth_pct"] == pytest.approx(0.75 * pct, abs=0.5)
    assert after_warm_up(samples)[0].at_s == 300.0


def test_single_peaks_are_no_growth() -> None:
    values = [100.0] * 30
    values[20] = values[29] = 500.0
    assert growth_pct(range(30), values) == 0.0
    assert growth_pct([0.0], [1.0]) == 0.0


def test_a_descriptor_now_and_then_is_a_leak() -> None:
    samples = made(fds=0.1)
    assert summary(samples, samples)["leaked"] == ["fds"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, 5, 5, 5], False),
        ([5, 6, 7, 8], True),
        ([5, 9, 5, 9, 5, 9], False),
        ([9, 5, 5, 8, 8, 8], False),
        ([5, 6], True),
        ([5], False),
        ([], False),
    ],
)
def test_only_what_never_comes_back_grew(values: list[float], expected: bool) -> None:
    assert grew(values) is expected


def test_what_is_left_at_one_quiet_point_is_a_leak() -> None:
    quiet = made()
    quiet[3] = replace(quiet[3], busy={"kv_cache_usage_perc": 0.01})
    assert summary(made(), quiet)["leaked"] == ["kv_cache_usage_perc"]
    # While it is asked, a server holds blocks.
    assert summary(quiet, made())["leaked"] == []


def test_answers_that_take_longer_at_the_end_are_drift() -> None:
    quiet = made()
    slower = [
        replace(one, probe_s=tuple(2 * seconds for seconds in one.probe_s)) if i > 30 else one
        for i, one in enumerate(quiet)
    ]
    assert summary(slower, slower)["latency_drift"] == pytest.approx(2.0, abs=0.1)


def test_gauges_are_read_without_prefix_and_summed_over_replicas() -> None:
    text = (
        "# TYPE minserve:num_requests_running gauge\n"
        'minserve:num_requests_running{replica="0"} 2.0\n'
        'minserve:num_requests_running{replica="1"} 3.0\n'
        "# TYPE process_open_fds gauge\nprocess_open_fds 17.0\n"
        "# TYPE minserve:prompt_tokens counter\nminserve:prompt_tokens_total 9.0\n"
    )
    assert gauges(text) == {"num_requests_running": 5.0, "process_open_fds": 17.0}
