"""Turns promises into seconds, once the speed of the idle device is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from minserve.slo.objectives import SLO, Targets
from minserve.workload.conversation import Turn


class Speed(Protocol):
    """The speed of an idle device for a lone request. `PerfModel` and `ZeroLoad` have this form."""

    def zero_load_prefill_s(self, num_tokens: int) -> float:
        """Return the seconds to the first token of a lone prompt of ``num_tokens`` tokens."""

    def zero_load_decode_s(self, context_tokens: int) -> float:
        """Return the seconds per output token with ``context_tokens`` tokens before it."""


def targets_of(turn: Turn, speed: Speed, slo: SLO | None = None) -> Targets:
    """Return a turn's own SLO, or another one for it, in seconds.

    A load test forces outputs to their length, so the model's marker never comes. A stage that
    the marker would end ends after the turn's thinking tokens instead.
    """
    targets = (turn.slo if slo is None else slo).resolve(
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
    """Return for each class the targets with the median TTFT.

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
