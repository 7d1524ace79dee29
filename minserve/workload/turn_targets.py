"""What a turn is promised in seconds, once it is known how fast the idle device is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from minserve.slo import Targets
from minserve.workload.conversation import Turn


class Speed(Protocol):
    """How fast an idle device serves a lone request. `PerfModel` and `ZeroLoad` are such."""

    def zero_load_prefill_s(self, num_tokens: int) -> float:
        """Seconds to the first token behind a prompt."""

    def zero_load_decode_s(self, context_tokens: int) -> float:
        """Seconds per token."""


def targets_of(turn: Turn, speed: Speed) -> Targets:
    """A turn's SLO in seconds.

    A load test forces outputs to their length, so no marker ever comes: a stage that would
    end at one ends after the turn's thinking tokens instead.
    """
    targets = turn.slo.resolve(
        speed.zero_load_prefill_s(turn.prompt_tokens),
        speed.zero_load_decode_s(turn.prompt_tokens),
    )
    first, *others = targets.stages
    if first.until is None:
        return targets
    if not turn.thinking_tokens:
        return replace(targets, stages=tuple(others))
    return replace(
        targets, stages=(replace(first, until=None, tokens=turn.thinking_tokens), *others)
    )


def typical_targets(turns: Iterable[tuple[str, Targets]]) -> dict[str, Targets]:
    """Of each class the targets with the median TTFT.

    Args:
        turns: class and targets of each request.
    """
    by_class: dict[str, list[Targets]] = {}
    for name, targets in turns:
        by_class.setdefault(name, []).append(targets)
    return {
        name: sorted(each, key=lambda one: one.ttft_s)[len(each) // 2]
        for name, each in by_class.items()
    }
