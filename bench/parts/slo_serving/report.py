"""Tables, capacity and plot of `slo_serving.py`, computed from finished runs.

Attainment is that of `minserve.slo.attainment`, on the client's own timestamps, over all offered
requests. Capacity is the largest rate with an attainment of at least 90%, interpolated linearly
between the measured rates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minserve.workload.answer import Answer
from minserve.workload.capacity import LEVEL, crossing
from minserve.workload.conversation import Conversation
from minserve.workload.plots import attainment_figure, draw_attainment, save
from minserve.workload.report import percentile, share
from minserve.workload.turn_targets import Speed, targets_of
from minserve.workload.verdict import Cause, Verdict
from shared.slo_load import CLASSES

# Every conversation here is a single turn, which is always sent.
MISSES = tuple(cause for cause in Cause if cause is not Cause.NOT_SENT)
COLOURS = {"dp": "#1f6feb", "edf": "#2da44e", "sarathi": "#bf8700", "fcfs": "#7d8590"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRun:
    """The answers to one trace under one policy.

    Attributes:
        process: the arrival process.
        rate: offered requests per second.
        variant: the policy's name, with its setting if several are tried.
        seconds: time over which requests arrived.
        cores_elsewhere: cores kept busy by other processes than the server and the client.
        slowness: a lone request's time per token, divided by the profile's.
        disturbed: true if these two are too high to trust the run.
    """

    process: str
    rate: float
    repeat: int
    policy: str
    variant: str
    seconds: float
    cores_elsewhere: float
    slowness: float
    disturbed: bool
    verdicts: Sequence[Verdict]


@dataclass(frozen=True, slots=True)
class PooledRuns:
    """All runs of one variant at one rate, pooled."""

    runs: Sequence[PolicyRun]

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for run in self.runs for verdict in run.verdicts]

    @property
    def attainment(self) -> float:
        return share(verdict.attained for verdict in self.verdicts)

    @property
    def goodput(self) -> float:
        """The attained requests per second of arrivals."""
        return sum(v.attained for v in self.verdicts) / sum(run.seconds for run in self.runs)

    @property
    def each(self) -> list[float]:
        """The attainment of each run."""
        return [share(verdict.attained for verdict in run.verdicts) for run in self.runs]

    def of_class(self, name: str) -> float:
        return share(verdict.attained for verdict in self.verdicts if verdict.name == name)


def disagreements(answers: Iterable[Answer]) -> int:
    """Return the number of answers for which the server promised other times than the client used.

    A difference from rounding does not count: the server rounds to microseconds.
    """
    count = 0
    for answer in answers:
        if answer.reported is None:
            continue
        ours, theirs = answer.targets, answer.reported["targets"]
        pairs = (
            (ours.ttft_s, theirs["ttft_ms"]),
            (ours.stages[-1].tpot_s, theirs["tpot_ms"]),
        )
        count += any(told is None or abs(s * 1e3 - told) > 2e-3 for s, told in pairs)
    return count


def cells(runs: Iterable[PolicyRun]) -> dict[tuple[str, float, str], PooledRuns]:
    """Return runs pooled by (process, rate, variant), in the order they first came."""
    grouped: dict[tuple[str, float, str], list[PolicyRun]] = {}
    for run in runs:
        grouped.setdefault((run.process, run.rate, run.variant), []).append(run)
    return {key: PooledRuns(group) for key, group in grouped.items()}


def curves(runs: Sequence[PolicyRun], process: str) -> dict[str, dict[float, PooledRuns]]:
    """Return policy -> rate -> cell, with a policy's best variant at each rate."""
    found: dict[str, dict[float, PooledRuns]] = {}
    for (its_process, rate, _), cell in sorted(cells(runs).items()):
        if its_process == process:
            curve = found.setdefault(cell.runs[0].policy, {})
            if rate not in curve or cell.attainment > curve[rate].attainment:
                curve[rate] = cell
    return found


def print_promises(workload: Sequence[Conversation], speed: Speed) -> None:
    """Print the SLOs in seconds that the slowdowns mean on this device."""
    print("\nclass            prompt  output (mean tokens)   TTFT SLO (median)   TPOT SLO")
    turns = [turn for conversation in workload for turn in conversation.turns]
    for work in CLASSES:
        own = [turn for turn in turns if turn.slo.name == work.name]
        if not own:
            continue
        prompt = sum(turn.prompt_tokens for turn in own) / len(own)
        output = sum(turn.output_tokens for turn in own) / len(own)
        targets = [targets_of(turn, speed) for turn in own]
        ttft = percentile([one.ttft_s for one in targets], 0.5)
        tpot = percentile([one.stages[-1].tpot_s for one in targets], 0.5)
        print(f"{work.name:15}{prompt:8.0f}{output:8.0f}{ttft:28.2f} s{1e3 * tpot:11.0f} ms")


def print_table(runs: Sequence[PolicyRun], process: str, classes: Sequence[str]) -> None:
    """Print a row per rate and variant: attainment, goodput, misses by cause, latencies."""
    print(f"\n{process} arrivals: % of offered requests that attained their SLO")
    head = f"{'req/s':>6} {'policy':18}{'all':>6}" + "".join(f"{c[:7]:>8}" for c in classes)
    head += f"{'mean form':>11}{'goodput':>9}  " + "".join(f"{miss.value:>18}" for miss in MISSES)
    print(head + f"{'TTFT p50':>10}{'p99 s':>7}{'TPOT p50':>10}{'p99 ms':>8}")
    for (its_process, rate, variant), cell in cells(runs).items():
        if its_process != process:
            continue
        verdicts = cell.verdicts
        causes = Counter(verdict.cause for verdict in verdicts)
        # Requests without a token took longer than any request with one.
        ttft = [math.inf if v.ttft_s is None else v.ttft_s for v in verdicts]
        tpot = [1e3 * v.tpot_s for v in verdicts if v.tpot_s is not None]
        row = f"{rate:6.2f} {variant:18}{100 * cell.attainment:6.1f}"
        row += "".join(f"{100 * cell.of_class(name):8.1f}" for name in classes)
        row += f"{100 * share(v.attained_mean for v in verdicts):11.1f}{cell.goodput:9.2f}  "
        row += "".join(f"{causes[miss]:18d}" for miss in MISSES)
        row += f"{percentile(ttft, 0.5):10.2f}{percentile(ttft, 0.99):7.2f}"
        print(row + f"{percentile(tpot, 0.5):10.0f}{percentile(tpot, 0.99):8.0f}")


def summary(runs: Sequence[PolicyRun]) -> dict[str, Any]:
    """Return capacity and attainment by process and policy, for the JSON line.

    ``at_least`` lists the policies that still attain 90% at the highest rate; a capacity of
    ``None`` lies below the lowest rate.
    """
    result: dict[str, Any] = {"capacity": {}, "at_least": {}, "attainment": {}}
    for process in dict.fromkeys(run.process for run in runs):
        rates = {
            policy: {rate: cell.attainment for rate, cell in sorted(curve.items())}
            for policy, curve in curves(runs, process).items()
        }
        found = {policy: crossing(curve) for policy, curve in rates.items()}
        result["capacity"][process] = {
            policy: None if one is None else round(one, 3) for policy, one in found.items()
        }
        result["at_least"][process] = [
            policy for policy, curve in rates.items() if curve[max(curve)] >= LEVEL
        ]
        result["attainment"][process] = {
            policy: {f"{rate:g}": round(one, 4) for rate, one in curve.items()}
            for policy, curve in rates.items()
        }
    return result


def print_capacity(result: Mapping[str, Any], lowest: float) -> None:
    """Print the capacities."""
    for process, capacities in result["capacity"].items():
        print(f"\n{process}: capacity, the most req/s with {LEVEL:.0%} attained (interpolated)")
        for policy, one in capacities.items():
            text = f"below {lowest:g}" if one is None else f"{one:.2f}"
            if policy in result["at_least"][process]:
                text = f"at least {text}"
            print(f"  {policy:14}{text}")


def plot(runs: Sequence[PolicyRun], file: str) -> None:
    """Save attainment against rate.

    There is a panel per arrival process, a line per policy, and a band from the lowest to the
    highest repeat.
    """
    processes = list(dict.fromkeys(run.process for run in runs))
    figure, panels = attainment_figure([f"{process} arrivals" for process in processes])
    for panel, process in zip(panels, processes, strict=True):
        for policy, curve in curves(runs, process).items():
            # Lines with drafts have the policy's colour and are dashed.
            colour, style = COLOURS[policy.partition("+")[0]], "--" if "+" in policy else "-"
            line = {rate: cell.each for rate, cell in curve.items()}
            draw_attainment(panel, policy, line, color=colour, linestyle=style)
    save(figure, file)
