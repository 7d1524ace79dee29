"""`Answer`: what a server sent for one request, token by token, by the client's clock."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from minserve.slo.attainment import Progress, judge
from minserve.slo.objectives import Targets, Task
from minserve.workload.conversation import Turn
from minserve.workload.verdict import Cause, Verdict, cause_of_miss

# The first token of a later stage has no deadline; the client waits for it this long.
STAGE_PATIENCE_S = 60.0


class Ending(Enum):
    """The way in which the exchange with the server ended."""

    CUT = "cut"  # the run ended before the answer did
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
    """A request and its answer so far. All times are in seconds on the client's clock.

    targets: the SLO in seconds by which it is judged.
    due_s: time at which it was to be sent; latencies count from here.
    has_next: true if another turn waits for this answer.
    task: the task that the server is told of; ``None`` for its targets alone.
    sent_s: time at which it was sent; NaN before.
    token_times: for each output token, the time at which its text came.
    text: text of the output so far.
    finish_reason: as the server gave it.
    error: the reason why the request failed or was refused.
    prompt_tokens: as the server counted them; ``None`` where it does not report them.
    reported: the server's report on the SLO; ``None`` where there is none.
    asked: the SLO in seconds that the server is asked for, if that is another one.
    """

    turn: Turn
    targets: Targets
    due_s: float
    has_next: bool = False
    task: Task | None = None
    sent_s: float = math.nan
    ending: Ending = Ending.CUT
    token_times: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    reported: Mapping[str, Any] | None = None
    asked: Targets | None = None
    # Whether every chunk reports the number of tokens so far; `None` before the first chunk.
    _counts_along: bool | None = None
    _num_reported: int | None = None

    @property
    def was_short(self) -> bool:
        """True if the server ended the output before it had the length that was asked for."""
        return self.ending is Ending.DONE and len(self.token_times) < self.turn.output_tokens

    def read_event(self, payload: bytes, now: float) -> None:
        """Take one event of a stream into account.

        A chunk whose usage is given stands for the tokens by which the count in the usage has
        grown. If chunks carry no usage, each chunk stands for one token.

        Args:
            payload: the text after ``data:``.

        Raises:
            ValueError: for a payload that is not an event of OpenAI's API.
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
        """Reconcile the tokens with the final count at the end of the stream.

        A stream that ended too early becomes a failure. If chunks were counted as tokens and the
        server then reports another number, the tokens are spread evenly over the chunks: the first
        token comes with the first chunk.
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
        """The time of the newest token; before the first token, the time of sending."""
        return self.token_times[-1] if self.token_times else self.sent_s

    @property
    def has_last_deadline(self) -> bool:
        """False if some token of the request has no deadline."""
        if math.isfinite(self.targets.finish_s):
            return True
        return math.isfinite(self.targets.ttft_s + self._longest_decode_s())

    def is_hopeless(self, now: float) -> bool:
        """Return True once neither form of attainment can be reached.

        This is so if the first token is late, or if ``now`` is past the last token's deadline.
        Before that, the mean form may still recover.
        """
        if now - self.due_s > self.targets.finish_s:
            return True
        first = self.token_times[0] if self.token_times else now
        if first - self.due_s > self.targets.ttft_s:
            return True
        return now - first > self._longest_decode_s()

    def _longest_decode_s(self) -> float:
        """Return the seconds from the first token to the deadline of the last one."""
        left, seconds = self.turn.output_tokens, 0.0
        for stage in self.targets.stages:
            count = left if stage.tokens is None else min(left, stage.tokens)
            # A stage of one token has no gap, so its pace adds nothing: 0 x inf is not a number.
            seconds += (count - 1) * stage.tpot_s if count > 1 else 0.0
            left -= count
        return seconds + STAGE_PATIENCE_S * (len(self.targets.stages) - 1)

    @property
    def in_vain(self) -> bool:
        """True if the server has said that its task cannot be in time."""
        task = None if self.reported is None else self.reported.get("task")
        return task is not None and task.get("given_up") is True

    def progress(self) -> Progress:
        """Return how the answer stands against its targets."""
        return judge(self.targets, self.due_s, self.token_times)

    def verdict(self, start_s: float) -> Verdict:
        """Return the verdict on the answer, by the client's clock.

        Args:
            start_s: time at which the workload began.
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
            finish_s=progress.finish_s if done else None,
            send_lag_s=0.0 if math.isnan(self.sent_s) else self.sent_s - self.due_s,
        )


def _chat_text(delta: Mapping[str, Any]) -> str:
    """Return a chunk's text, with the thinking that some servers send in a separate field."""
    return (delta.get("reasoning_content") or delta.get("reasoning") or "") + (
        delta.get("content") or ""
    )
