"""`Paces`: when each sequence's next token is due, and how fast the others must follow.

A TTFT and a TPOT say so themselves. The deadline of a whole output (``finish``) leaves it open: the
planner may begin late and decode fast, or the other way round. Here the deadline becomes a due time
and a pace, from a guess of how many tokens are still to come. Both are worked out anew in every
round of admission, so that an output that outlives its guess gets a tighter pace:

- Before its first token a request may wait for a share of its time. The rest is for its decodes, at
  the pace that then keeps the deadline. A request that has waited longer gets a tighter pace.
- A decode spreads the time that is left evenly over the tokens that are left. What it was ahead of
  its pace thereby slows the pace of all tokens behind.
- No pace is tighter than the device can give beside the other decodes and their prefills. An output
  that needs a tighter one keeps its deadline if it is shorter than guessed, or if others end.

Where a TTFT or TPOT is promised beside a deadline, whatever is due sooner counts. A due time that
follows from a deadline is a plan: only the deadline itself can break the promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from minserve.request import Sequence

# Paces are rounded down to powers of this, so that those of many requests share a tier.
STEP = 2.0**0.25
# Of the time from arrival to deadline, at most so much is planned for decodes.
DECODE_SHARE = 0.5
# Where even the tightest pace is too slow for the guess, the prefill is due after this share of the
# time: the output may be shorter than guessed.
WAIT_SHARE = 0.1
# Pace of a lone output, as a multiple of its decode's time: chunks of prefills come between.
LONE = 1.25
# The slowest pace that is planned for, as such a multiple. Iterations in which nothing else is due
# last so long; slower decodes would hold their blocks for longer and bring nothing.
SLOWEST = 5.0
# What the other decodes take, so many times over, is left to them and their prefills. Shorter
# iterations would pay their constant cost too often.
LEFT_TO_OTHERS = 10.0


class Pace(NamedTuple):
    """What a deadline asks of a sequence.

    Attributes:
        due_s: time at which its next token is due.
        latest_s: time at which it would be due on an idle device.
        tpot_s: seconds per token behind that one, for its tier; a power of `STEP`, inf for none.
        step_s: seconds by which each further token is due later.
        num_tokens: output tokens that it had when this was worked out.
    """

    due_s: float
    latest_s: float
    tpot_s: float
    step_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PaceLimits:
    """The paces that are planned for; seconds.

    Attributes:
        lone_s: the tightest pace of a lone output.
        tightest_s: the tightest pace beside the present decodes.
        slowest_s: the slowest pace.
        guard_s: time before the deadline at which the last token must be ready.
    """

    lone_s: float
    tightest_s: float
    slowest_s: float
    guard_s: float

    @classmethod
    def of(cls, lone_decode_s: float, decodes_s: float, guard_s: float) -> PaceLimits:
        """Return the limits of a device.

        Args:
            lone_decode_s: predicted seconds of a batch of one decode.
            decodes_s: predicted seconds of a batch of the present decodes; 0 if there are none.
        """
        token_s = lone_decode_s + guard_s
        others_s = max(0.0, decodes_s - lone_decode_s)
        slowest_s = SLOWEST * token_s
        tightest_s = min(LONE * token_s + LEFT_TO_OTHERS * others_s, slowest_s)
        return cls(LONE * token_s, tightest_s, slowest_s, guard_s)


def pace_of(seq: Sequence, num_left: int, now: float, prefill_s: float, limits: PaceLimits) -> Pace:
    """Return what the deadline of a sequence asks of it.

    Args:
        num_left: guess of how many tokens are still to come, at least 1.
        now: the present time in seconds.
        prefill_s: seconds of what is left of its prefill on the idle device; not for a decode.
    """
    progress = seq.slo_progress
    pace = _pace_by(progress.finish_by_s, seq, num_left, now, prefill_s, limits)
    aim_by_s = seq.request.arrival_s + progress.targets.aim_s
    if aim_by_s >= progress.finish_by_s:
        return pace
    aimed = _pace_by(aim_by_s, seq, num_left, now, prefill_s, limits)
    # An aim that asks for too much is given up for the deadline itself.
    return aimed._replace(latest_s=pace.latest_s) if aimed.step_s > limits.tightest_s else pace


def _pace_by(
    finish_s: float,
    seq: Sequence,
    num_left: int,
    now: float,
    prefill_s: float,
    limits: PaceLimits,
) -> Pace:
    """Return what an end by ``finish_s`` asks of a sequence; the others are those of `pace_of`."""
    progress, done = seq.slo_progress, seq.num_output_tokens
    last_s = progress.last_token_s
    if last_s is None or not seq.is_decoding:
        arrival_s = seq.request.arrival_s
        pace = pace_before(arrival_s, finish_s, num_left, now, prefill_s, limits)
        return pace._replace(num_tokens=done) if done else pace
    latest_s = finish_s - (num_left - 1) * limits.lone_s
    step_s = max((finish_s - limits.guard_s - last_s) / num_left, limits.tightest_s)
    tpot_s = round_down(min(step_s, limits.slowest_s))
    return Pace(last_s + step_s + limits.guard_s, latest_s, tpot_s, step_s, done)


def pace_before(
    arrival_s: float,
    finish_s: float,
    num_left: int,
    now: float,
    prefill_s: float,
    limits: PaceLimits,
) -> Pace:
    """Return what a deadline asks of a sequence whose prefill is still to be done.

    Args:
        finish_s: time of its deadline.
        num_left: guess of how many tokens are still to come, at least 1.
        now: the present time in seconds.
        prefill_s: seconds of what is left of its prefill on the idle device.
    """
    behind, step_s = num_left - 1, limits.slowest_s
    latest_s = finish_s - behind * limits.lone_s
    if behind:
        planned_s = DECODE_SHARE * (finish_s - arrival_s)
        possible_s = finish_s - limits.guard_s - now - prefill_s
        step_s = min(step_s, max(min(planned_s, possible_s) / behind, limits.tightest_s))
    step_s = round_down(step_s)
    due_s = finish_s - behind * step_s
    soon_s = now + prefill_s + WAIT_SHARE * (latest_s - now - prefill_s)
    soon_s = max(soon_s, arrival_s + WAIT_SHARE * (finish_s - arrival_s))
    if due_s < soon_s:
        due_s = min(soon_s, latest_s)
    return Pace(due_s, latest_s, step_s, step_s, 0)


def round_down(pace_s: float) -> float:
    """Return the largest power of `STEP` that is at most this, except for what rounding does."""
    return STEP ** math.floor(math.log(pace_s, STEP) + 1e-9)


@dataclass(slots=True)
class Paces:
    """The paces of one round of admission.

    Args:
        by_id: what deadlines ask for, by sequence id; sequences without a deadline are not listed.
    """

    by_id: dict[str, Pace] = field(default_factory=dict)

    def due_s(self, seq: Sequence) -> float:
        """Return when the next token of a sequence with an SLO is due; inf if nothing says so."""
        progress = seq.slo_progress
        pace = self.by_id.get(seq.seq_id)
        if pace is None:
            return min(progress.next_deadline_s, progress.finish_by_s)
        more = seq.num_output_tokens - pace.num_tokens
        due_s = pace.due_s + more * pace.step_s if more else pace.due_s
        return min(progress.next_deadline_s, due_s)

    def latest_s(self, seq: Sequence) -> float:
        """Return when it would be due on an idle device, whatever else runs now."""
        progress = seq.slo_progress
        pace = self.by_id.get(seq.seq_id)
        latest_s = progress.finish_by_s if pace is None else pace.latest_s
        return min(progress.next_deadline_s, latest_s)

    def starts_s(self, seq: Sequence, now: float) -> float:
        """Return from when on a decode demands a token in every TPOT.

        One that is ahead of its TPOT needs nothing until it is due again. One with a deadline is
        better done early, since its guess may be too short.
        """
        if self.hurries(seq):
            return now
        return max(now, self.due_s(seq) - self.tpot_s(seq))

    def tpot_s(self, seq: Sequence) -> float:
        """Return the pace of a sequence's present stage in seconds per token; inf for none."""
        return self.at_most(seq, seq.slo_progress.tpot_s)

    def at_most(self, seq: Sequence, tpot_s: float) -> float:
        """Return a stage's own pace, or that of the deadline if it is tighter."""
        pace = self.by_id.get(seq.seq_id)
        return tpot_s if pace is None or tpot_s < pace.tpot_s else pace.tpot_s

    def of_deadline_s(self, seq: Sequence) -> float:
        """Return the pace that follows from a sequence's deadline; inf without one."""
        pace = self.by_id.get(seq.seq_id)
        return math.inf if pace is None else pace.tpot_s

    def hurries(self, seq: Sequence) -> bool:
        """Return True if a deadline asks for a tighter pace than the TPOT."""
        return self.of_deadline_s(seq) < seq.slo_progress.tpot_s

    def relax(self, seq: Sequence) -> None:
        """Ask nothing of a sequence for the sake of its deadline, except that it is kept."""
        pace = self.by_id[seq.seq_id]
        finish_s = seq.slo_progress.finish_by_s
        self.by_id[seq.seq_id] = pace._replace(due_s=finish_s, tpot_s=math.inf, step_s=0.0)
