"""`Verdict`: the outcome of one request of a workload, by the clock of the client or simulator.

The open-loop client and the simulator both end in verdicts; reports are made of verdicts alone.
Attainment is that of `minserve.slo.attainment`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from minserve.slo.attainment import Progress


class Cause(Enum):
    """The cause for which a request missed its SLO."""

    LATE_TTFT = "late first token"
    LATE_TPOT = "late token"
    LATE_FINISH = "late end"
    REJECTED = "rejected"
    FAILED = "failed"
    UNANSWERED = "unanswered"
    NOT_SENT = "not sent"  # the turn before was not answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of one request that was offered; times are in seconds.

    Attributes:
        name: its class.
        arrival_s: time at which it was due, from the beginning of the workload.
        cause: cause of the miss; ``None`` if the SLO was attained in the deadline form.
        attained_mean: True if the SLO was attained in the mean form.
        best_effort: True if the server gave the SLO up and served the request late.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens of the output that came.
        ttft_s: time to the first token; ``None`` if no token came.
        tpot_s: mean time per token over the output; ``None`` before two tokens.
        finish_s: time to the last token; ``None`` if the output did not come to its end.
        send_lag_s: how late the client itself sent the request.
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
    finish_s: float | None = None
    send_lag_s: float = 0.0

    @property
    def attained(self) -> bool:
        return self.cause is None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the cause by its name in lower case."""
        cause = None if self.cause is None else self.cause.name.lower()
        return {**asdict(self), "cause": cause}


def cause_of_miss(progress: Progress, *, done: bool) -> Cause | None:
    """Return why a request that was neither refused nor failed missed its SLO; ``None`` if it did
    not.

    Args:
        done: True if its whole output came.
    """
    if done and progress.attained:
        return None
    if progress.first_token_s is None:
        return Cause.UNANSWERED
    if progress.late_ttft:
        return Cause.LATE_TTFT
    if progress.late_tpot:
        return Cause.LATE_TPOT
    # One that was cut off before its end failed what it would have broken first.
    by_finish = math.isfinite(progress.finish_by_s) and progress.breaks_s >= progress.finish_by_s
    return Cause.LATE_FINISH if progress.late_finish or by_finish else Cause.LATE_TPOT
