"""`Answer`: what came back for one request, token by token, by the client's clock."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from minserve.attainment import Progress, judge
from minserve.slo import Targets
from minserve.workload.conversation import Turn
from minserve.workload.verdict import Cause, Verdict, cause_of_miss

# The first token of a later stage has no deadline; it is waited for this long.
STAGE_PATIENCE_S = 60.0


class Ending(Enum):
    """How the exchange with the server ended."""

    CUT = "cut"  # not at all: the run ended before it
    DONE = "done"
    REJECTED = "rejected"
    FAILED = "failed"
    NOT_SENT = "not sent"


_CAUSES = {
    Ending.REJECTED: Cause.REJECTED,
    Ending.FAILED: Cause.FAILED,
    Ending.NOT_SENT: Cause.NOT_SENT,
}


@dataclass(slots=True, eq=False)
class Answer:
    """One request and what became of it.

    Attributes:
        targets: what it is promised.
        due_s: when it was to be sent; latencies count from here.
        has_next: another turn waits for this one's answer.
        sent_s: when it was sent; NaN before.
        token_times: one per output token, when its text came.
        text: of the output so far.
        finish_reason: the server's.
        error: why it failed or was refused.
        prompt_tokens: as the server counted them; ``None`` where it does not say.
        reported: what the server says of the SLO, where it does.
    """

    turn: Turn
    targets: Targets
    due_s: float
    has_next: bool = False
    sent_s: float = math.nan
    ending: Ending = Ending.CUT
    token_times: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    reported: Mapping[str, Any] | None = None
    # Whether every chunk says how many tokens came so far; `None` before the first one.
    _counts_along: bool | None = None
    _num_reported: int | None = None

    @property
    def was_short(self) -> bool:
        """True where the server ended the output before the length that was asked for."""
        return self.ending is Ending.DONE and len(self.token_times) < self.turn.output_tokens

    def read_event(self, payload: bytes, now: float) -> None:
        """Take one event of a stream into account.

        A chunk stands for as many tokens as its usage has more than the last one's; where
        chunks carry no usage, for one.

        Args:
            payload: what follows ``data:``.

        Raises:
            ValueError: for anything that is no event of OpenAI's.
        """
        if payload == b"[DONE]":
            if self.ending is Ending.CUT:
                self.ending = Ending.DONE
            return
        try:
            self._read(json.loads(payload), now)
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"not an event of a stream: {payload[:80]!r}") from None

    def _read(self, event: Mapping[str, Any], now: float) -> None:
        if "error" in event:
            self.fail(f"in mid-stream: {event['error']}")
            return
        usage = event.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.reported = usage.get("slo", self.reported)
        self._num_reported = usage.get("completion_tokens", self._num_reported)
        if (self._num_reported or 0) > self.turn.output_tokens:
            raise ValueError(
                f"{self._num_reported} tokens came of {self.turn.output_tokens} asked for"
            )
        choices = event.get("choices") or []
        if choices:
            self._read_choice(choices[0], bool(usage), now)
        elif self._counts_along:
            self._count_up(now)

    def _read_choice(self, choice: Mapping[str, Any], has_usage: bool, now: float) -> None:
        text = choice.get("text") or _chat_text(choice.get("delta") or {})
        self.text += text
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if self._counts_along is None:
            self._counts_along = has_usage
        if self._counts_along:
            self._count_up(now)
        elif text:
            self.token_times.append(now)

    def _count_up(self, now: float) -> None:
        self.token_times += [now] * ((self._num_reported or 0) - len(self.token_times))

    def close(self) -> None:
        """The stream has ended: reconcile tokens with the final count, and say so if it broke.

        Where chunks were counted as tokens and the server then reports another number, the
        tokens are spread evenly over the chunks: the first token is the first chunk's.
        """
        if self.ending is Ending.CUT:
            if self.finish_reason is None:
                came, asked = len(self.token_times), self.turn.output_tokens
                self.fail(f"the stream ended after {came} of {asked} tokens")
                return
            self.ending = Ending.DONE
        times, count = self.token_times, self._num_reported
        if count is not None and times and count != len(times):
            step = (len(times) - 1) / max(1, count - 1)
            self.token_times = [times[round(i * step)] for i in range(count)]

    def fail(self, error: str) -> None:
        self.ending, self.error = Ending.FAILED, error

    @property
    def last_heard_s(self) -> float:
        """When its newest token came, or else when it was sent."""
        return self.token_times[-1] if self.token_times else self.sent_s

    @property
    def has_last_deadline(self) -> bool:
        """False where some token may come whenever it likes."""
        return math.isfinite(self.targets.ttft_s + self._longest_decode_s())

    def is_hopeless(self, now: float) -> bool:
        """True once neither form of attainment can be reached: the first token is late, or
        now is past the time when the last one is due. Until then the mean may recover.
        """
        first = self.token_times[0] if self.token_times else now
        if first - self.due_s > self.targets.ttft_s:
            return True
        return now - first > self._longest_decode_s()

    def _longest_decode_s(self) -> float:
        """From the first token to the last one's deadline."""
        left, seconds = self.turn.output_tokens, 0.0
        for stage in self.targets.stages:
            count = left if stage.tokens is None else min(left, stage.tokens)
            # No token but the first has no gap, whatever the pace: 0 x inf is not a number.
            seconds += (count - 1) * stage.tpot_s if count > 1 else 0.0
            left -= count
        return seconds + STAGE_PATIENCE_S * (len(self.targets.stages) - 1)

    def progress(self) -> Progress:
        """How it stands against its targets."""
        return judge(self.targets, self.due_s, self.token_times)

    def verdict(self, start_s: float) -> Verdict:
        """Judge it by the client's clock.

        Args:
            start_s: when the workload began.
        """
        progress, done = self.progress(), self.ending is Ending.DONE
        cause = _CAUSES.get(self.ending) or cause_of_miss(progress, done=done)
        given_up = self.reported is not None and self.reported.get("admitted") is False
        prompt_tokens = self.prompt_tokens
        return Verdict(
            name=self.turn.slo.name,
            arrival_s=self.due_s - start_s,
            cause=cause,
            attained_mean=done and progress.attained_mean,
            best_effort=done and given_up and cause is not None,
            prompt_tokens=self.turn.prompt_tokens if prompt_tokens is None else prompt_tokens,
            output_tokens=len(self.token_times),
            ttft_s=progress.ttft_s,
            tpot_s=progress.mean_tpot_s,
            send_lag_s=0.0 if math.isnan(self.sent_s) else self.sent_s - self.due_s,
        )


def _chat_text(delta: Mapping[str, Any]) -> str:
    """With what a reasoning model thinks, which some servers send apart."""
    return (delta.get("reasoning_content") or delta.get("reasoning") or "") + (
        delta.get("content") or ""
    )
