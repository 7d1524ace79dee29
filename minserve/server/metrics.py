"""GET /metrics: the engine's counts in Prometheus' text format, under vLLM's names.

The engine counts; this module only names the counts. Labels come from fixed sets: finish
reasons and outcomes from their enums, SLO classes as configured (``custom`` for an SLO without
a class; a request without an SLO is in no class), positions up to ``max_speculation``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from minserve.server.engine_face import EngineFace, ReplicaSet
from minserve.slo.attainment import Outcome

if TYPE_CHECKING:
    from minserve.engine.stats import EngineStats, Histogram

# The prefix of minserve's own names.
OWN_PREFIX = "minserve"
CONTENT_TYPE = CONTENT_TYPE_LATEST


class EngineCollector(Collector):
    """Reads one engine's counts at each scrape.

    Args:
        find_engine: returns the engine to ask; raises while there is none.
        find_name: returns the model's name in the API.
        prefix: what all names begin with, before a colon. With another one than minserve's own,
            all samples have the model's name as a label: dashboards made for vLLM choose by it.
    """

    def __init__(
        self,
        find_engine: Callable[[], EngineFace],
        find_name: Callable[[], str],
        prefix: str = OWN_PREFIX,
    ) -> None:
        self._find_engine, self._find_name, self._prefix = find_engine, find_name, prefix

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, all of the same moment."""
        engine, prefix = self._find_engine(), f"{self._prefix}:"
        labels = {} if self._prefix == OWN_PREFIX else {"model_name": self._find_name()}
        for family in _all_families(engine):
            family.name = prefix + family.name
            family.samples = [
                sample._replace(name=prefix + sample.name, labels={**labels, **sample.labels})
                for sample in family.samples
            ]
            yield family


def _all_families(engine: EngineFace) -> Iterator[Metric]:
    """Yield the metrics of an engine, or of its replicas side by side; names without prefix."""
    replicas, most = engine.replica_set, engine.config.max_speculation
    yield GaugeMetricFamily(
        "num_requests_unfinished",
        "Outputs that clients wait for, wherever they are.",
        engine.num_unfinished,
    )
    yield _counter(
        "tasks",
        "Agents' tasks by outcome, as soon as it is known.",
        "outcome",
        ((outcome.value, num) for outcome, num in engine.task_outcomes.items()),
    )
    merged: dict[str, Metric] = {}
    for replica, own in engine.stats_by_replica().items():
        labels = {} if replicas is None else {"replica": replica}
        for family in _families(own, most):
            merged.setdefault(family.name, family)
            if merged[family.name] is family:
                samples, family.samples = family.samples, []
            else:
                samples = family.samples
            merged[family.name].samples += [
                sample._replace(labels={**sample.labels, **labels}) for sample in samples
            ]
    yield from merged.values()
    if replicas is not None:
        yield from _replicas(replicas)


def _families(stats: EngineStats, max_speculation: int) -> Iterator[Metric]:
    """Yield the metrics of one engine."""
    yield from _gauges(stats)
    yield from _counters(stats)
    yield from _speculation(stats, max_speculation)
    yield from _slo(stats)
    yield from _request_histograms(stats)
    yield from _iteration_histograms(stats)


def _replicas(replicas: ReplicaSet) -> Iterator[Metric]:
    """Yield what a replicas counts in addition to the counts of its replicas."""
    up = GaugeMetricFamily("replica_up", "1 while the replica takes requests.", labels=("replica",))
    routed = CounterMetricFamily(
        "routed_requests", "Requests sent to a replica.", labels=("replica",)
    )
    lost = CounterMetricFamily(
        "replica_losses", "Times that a replica was lost.", labels=("replica",)
    )
    for replica in replicas.replicas():
        name = (str(replica["replica"]),)
        up.add_metric(name, replica["state"] == "up")
        routed.add_metric(name, replica["routed"])
        lost.add_metric(name, replica["lost"])
    yield from (up, routed, lost)
    yield CounterMetricFamily(
        "request_hops",
        "Times that a request was moved on to a replica that may keep its SLO.",
        replicas.routing.num_hops,
    )
    yield CounterMetricFamily(
        "resumed_requests",
        "Times that a request went on elsewhere because its replica was lost.",
        replicas.routing.num_resumed,
    )


def create_registry(
    find_engine: Callable[[], EngineFace],
    find_name: Callable[[], str],
    prefix: str = OWN_PREFIX,
) -> CollectorRegistry:
    """Return a registry with one engine's metrics and those of the server's own process.

    Of the process it has what every Prometheus client tells: ``process_open_fds`` and the like.
    The arguments are those of `EngineCollector`.
    """
    registry = CollectorRegistry()
    registry.register(EngineCollector(find_engine, find_name, prefix))
    ProcessCollector(registry=registry)
    return registry


def count_tasks(registry: CollectorRegistry, prefix: str = OWN_PREFIX) -> Callable[[], None]:
    """Add a gauge of asyncio's tasks to a registry.

    Args:
        prefix: as in `EngineCollector`.

    Returns:
        a function that counts the tasks of the event loop in which it is called.
    """
    name, says = f"{prefix}:asyncio_tasks", "Tasks of the server's event loop."
    gauge = Gauge(name, says, registry=registry)
    return lambda: gauge.set(len(asyncio.all_tasks()))


def render(registry: CollectorRegistry) -> bytes:
    """Return the text of a scrape, of type `CONTENT_TYPE`; takes milliseconds, from any thread."""
    return generate_latest(registry)


def _gauges(stats: EngineStats) -> Iterator[Metric]:
    for name, text, value in (
        ("num_requests_running", "Outputs that hold KV blocks.", stats.num_running),
        ("num_requests_waiting", "Outputs that wait to start.", stats.num_waiting),
        ("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", stats.kv_usage),
        (
            "profile_completeness",
            "Share of a full profile's measurements that were made; below 1 the profile is refined "
            "while nothing runs.",
            stats.profile_completeness,
        ),
    ):
        yield GaugeMetricFamily(name, text, value)


def _counters(stats: EngineStats) -> Iterator[Metric]:
    for name, text, value in (
        (
            "prefix_cache_queries",
            "Tokens looked up in the prefix cache at a start.",
            stats.num_prefix_queries,
        ),
        ("prefix_cache_hits", "Of these tokens, those it held.", stats.num_prefix_hits),
        (
            "num_preemptions",
            "Times that a running output gave up its KV blocks.",
            stats.num_preemptions,
        ),
        (
            "prompt_tokens",
            "Prompt tokens of requests whose first output has begun.",
            stats.num_prompt_tokens,
        ),
        ("generation_tokens", "Tokens of outputs.", stats.num_generation_tokens),
        (
            "surplus_tokens",
            "Tokens that ran behind the end of an output, which was not known yet.",
            stats.num_surplus_tokens,
        ),
    ):
        yield CounterMetricFamily(name, text, value)
    yield _counter(
        "request_success",
        "Outputs that ended, by reason.",
        "finished_reason",
        ((reason.value, num) for reason, num in stats.finished.items()),
    )
    yield _counter(
        "plans_ahead",
        "Iterations planned while the one before ran, by whether the plan was launched meanwhile, "
        "held when that had ended, or was discarded.",
        "outcome",
        stats.plans_ahead.items(),
    )
    yield _counter(
        "planner_fallbacks",
        "Iterations that a safe policy planned, by what the configured one did: raised an error, "
        "hung, made a plan that cannot be carried out, or rests after that.",
        "reason",
        stats.planner_fallbacks.items(),
    )
    yield _counter(
        "failed_batches",
        "Batches that failed as a whole and ran in parts, by the reason.",
        "reason",
        stats.failed_batches.items(),
    )


def _speculation(stats: EngineStats, max_speculation: int) -> Iterator[Metric]:
    counts = stats.speculation
    for name, text, value in (
        ("num_drafts", "Proposals verified.", counts.num_drafts),
        ("num_draft_tokens", "Tokens drafted.", counts.num_draft_tokens),
        ("num_accepted_tokens", "Drafted tokens accepted.", counts.num_accepted_tokens),
    ):
        yield CounterMetricFamily(f"spec_decode_{name}", text, value)
    places = dict.fromkeys(range(max_speculation), 0)
    places.update(enumerate(counts.num_accepted_per_pos))
    yield _counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens accepted, by their position in the proposal.",
        "position",
        ((str(place), num) for place, num in places.items()),
    )


def _slo(stats: EngineStats) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "slo_requests",
        "Outputs with an SLO that ended; one that was aborted counts only where it was late.",
        labels=("class", "outcome"),
    )
    ended: dict[str, int] = {}
    for (name, outcome), num in stats.slo_requests.items():
        requests.add_metric((name, outcome.value), num)
        ended[name] = ended.get(name, 0) + num
    yield requests
    attainment = GaugeMetricFamily(
        "slo_attainment",
        "Share of these that attained their SLO since the start; missing before the first.",
        labels=("class",),
    )
    for name, num in ended.items():
        if num:
            attainment.add_metric((name,), stats.slo_requests[name, Outcome.ATTAINED] / num)
    yield attainment


def _request_histograms(stats: EngineStats) -> Iterator[Metric]:
    for name, text, histogram in (
        ("time_to_first_token_seconds", "From arrival to the first token.", stats.ttft_s),
        (
            "inter_token_latency_seconds",
            "Between two deliveries of tokens to one output.",
            stats.inter_token_s,
        ),
        (
            "e2e_request_latency_seconds",
            "From arrival to the end, of outputs that ended by stop or length.",
            stats.e2e_s,
        ),
        ("request_queue_time_seconds", "From arrival to the first start.", stats.queue_s),
        (
            "request_prefill_time_seconds",
            "From the start to the first token.",
            stats.prefill_s,
        ),
        (
            "request_decode_time_seconds",
            "From the first to the last token, of outputs that ended by stop or length.",
            stats.decode_s,
        ),
        (
            "request_prompt_tokens",
            "Prompt tokens of outputs that ended by stop or length.",
            stats.request_prompt_tokens,
        ),
        (
            "request_generation_tokens",
            "Tokens of outputs that ended by stop or length.",
            stats.request_generation_tokens,
        ),
    ):
        yield _histogram(name, text, histogram)


def _iteration_histograms(stats: EngineStats) -> Iterator[Metric]:
    for name, text, histogram in (
        (
            "iteration_seconds",
            "Of an iteration that ran a batch, with the planning that it waited for.",
            stats.iteration_s,
        ),
        ("iteration_predicted_seconds", "The same as the planner foresaw it.", stats.predicted_s),
        (
            "iteration_profiled_seconds",
            "The same by the device's profile, without what was learned since.",
            stats.profiled_s,
        ),
        ("iteration_surprise", "Measured over foreseen time of an iteration.", stats.surprises),
        ("planning_seconds", "Of planning an iteration.", stats.planning_s),
    ):
        yield _histogram(name, text, histogram)
    tokens = HistogramMetricFamily(
        "batch_tokens", "Tokens that one iteration ran, by kind.", labels=("kind",)
    )
    for kind, histogram in (
        ("prefill", stats.prefill_tokens),
        ("decode", stats.decode_tokens),
        ("draft", stats.draft_tokens),
    ):
        tokens.add_metric((kind,), _buckets(histogram), histogram.total)
    yield tokens


def _counter(name: str, text: str, label: str, values: Iterable[tuple[str, int]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, num in values:
        family.add_metric((value,), num)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=_buckets(histogram), sum_value=histogram.total)


def _buckets(histogram: Histogram) -> list[tuple[str, int]]:
    """Return pairs of a bucket's upper bound and the count up to it, as Prometheus wants them."""
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
