"""`Verdict`: what became of one request of a workload, by whoever's clock.

The open-loop client and the simulator both end in verdicts; reports are made of nothing else.
Attainment is that of `minserve.attainment`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from minserve.attainment import Progress


class Cause(Enum):
    """Why a request missed its SLO."""

    LATE_TTFT = "late first token"
    LATE_TPOT = "late token"
    REJECTED = "rejected"
    FAILED = "failed"
    UNANSWERED = "unanswered"
    NOT_SENT = "not sent"  # a turn behind one that was not answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one request that was offered; times in seconds.

    Attributes:
        name: its class.
        arrival_s: when it was due, from the beginning of the workload.
        cause: of the miss; ``None`` where the SLO was attained (deadline form).
        attained_mean: the mean form.
        best_effort: True where the server gave the SLO up and served it late.
        prompt_tokens, output_tokens: those of the output as far as they came.
        ttft_s: ``None`` where no token came.
        tpot_s: mean over the output; ``None`` before two tokens.
        send_lag_s: how late the client itself was.
    """

    name: str
    arrival_s: float
    cause: Cause | None
    attained_mean: bool
    best_effort: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    send_lag_s: float = 0.0

    @property
    def attained(self) -> bool:
        return self.cause is None


def cause_of_miss(progress: Progress, *, done: bool) -> Cause | None:
    """Judge a request that was neither refused nor failed.

    Args:
        done: its whole output came.
    """
    if done and progress.attained:
        return None
    if progress.first_token_s is None:
        return Cause.UNANSWERED
    return Cause.LATE_TTFT if progress.late_ttft else Cause.LATE_TPOT
