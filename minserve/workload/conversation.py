"""`Conversation` and `Turn`: the parts of a workload. They hold lengths, times and promises.

A turn is one request to the server. Most conversations have one; in a tool loop each turn
repeats the prompt and the answer of the one before it, and adds what the tool returned::

    arrival ─► turn 1 ─► answer ──delay──► turn 2 (= turn 1 + answer + new) ─► answer ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minserve.slo.objectives import SLO

if TYPE_CHECKING:
    from minserve.workload.task_terms import TaskTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A request to the server.

    Attributes:
        slo: the promise, by which the turn is judged; its ``name`` is the class in reports.
        asked: the promise that the server is asked for, if that is another one.
        prompt_tokens: tokens of the whole prompt, at least 1.
        output_tokens: at least 1; with stages, the sum over all stages.
        shared_tokens: leading tokens that the prompt shares with the turn before: that turn's
            prompt, then as much of its answer as fits. 0 for a first turn.
        delay_s: seconds from the last token of the turn before to this turn's arrival. 0 for a
            first turn, which arrives with its conversation.
        thinking_tokens: tokens of the output before ``</think>``.
        n: number of outputs, each of these lengths. The turn attains its SLO if all outputs do,
            and ends with the last of them; a next turn repeats the first output.
        text: the new part of the prompt, for a real model; ``None`` stands for as many tokens as
            are needed.
    """

    slo: SLO
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    delay_s: float = 0.0
    thinking_tokens: int = 0
    n: int = 1
    text: str | None = None
    asked: SLO | None = None

    @property
    def asked_slo(self) -> SLO:
        """The promise that the server is asked for."""
        return self.slo if self.asked is None else self.asked


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow one another.

    Attributes:
        arrival_s: arrival of the first turn, in seconds from the beginning of the workload.
        turns: at least one turn.
        terms: the deadline of the turns together, as one task; ``None`` for no such deadline.
    """

    arrival_s: float
    turns: tuple[Turn, ...]
    terms: TaskTerms | None = None


def num_turns(workload: Sequence[Conversation]) -> int:
    """Return the number of requests in a workload."""
    return sum(len(conversation.turns) for conversation in workload)
