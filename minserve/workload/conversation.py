"""`Conversation` and `Turn`: what a workload is made of. Lengths, times and promises only.

A turn is one request to the server. Most conversations have one; in a tool loop each turn
repeats the prompt and the answer of the one before it, and adds what the tool returned::

    arrival ─► turn 1 ─► answer ──delay──► turn 2 (= turn 1 + answer + new) ─► answer ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minserve.slo import SLO


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request.

    Attributes:
        slo: what is promised; its ``name`` is the class in reports.
        prompt_tokens: in all, at least 1.
        output_tokens: at least 1; with stages, of all of them together.
        shared_tokens: leading tokens that are those of the turn before: its prompt, then as
            much of its answer as fits. 0 for a first turn.
        delay_s: from the last token of the turn before to this one's arrival. 0 for a first
            turn, which arrives with its conversation.
        thinking_tokens: of the output, those before ``</think>``.
        n: outputs asked for, each as long as all that says. The turn attains its SLO if all of
            them do, and ends with the last of them; a next turn repeats the first one.
        text: the new part of the prompt where a real model is to answer; ``None`` stands for
            as many tokens as are needed.
    """

    slo: SLO
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    delay_s: float = 0.0
    thinking_tokens: int = 0
    n: int = 1
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns one after another.

    Attributes:
        arrival_s: of the first turn, from the beginning of the workload.
        turns: at least one.
    """

    arrival_s: float
    turns: tuple[Turn, ...]


def num_turns(workload: Sequence[Conversation]) -> int:
    """Requests in a workload."""
    return sum(len(conversation.turns) for conversation in workload)
