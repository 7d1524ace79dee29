"""`ReplyBase`: what every kind of answer counts of its outputs, for usage, the log and traces."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from minserve.outputs import OutputDelta, OutputTimes
from minserve.request import FinishReason
from minserve.server.pauses import Pauses
from minserve.server.prompt_choices import PromptChoices
from minserve.server.protocol import GenerationCall
from minserve.slo.attainment import SLOReport, worst_report

# The end of an output that calls tools, in place of "stop".
TOOL_CALLS = "tool_calls"


class ReplyBase:
    """Counts the outputs of one request.

    Args:
        answer_id: the answer's id.
        model: the model's name in the API.
        groups: the choices of each prompt.

    Attributes:
        ends: how many outputs have ended, by their finish reason.
        times: of these outputs, by the number of their choice, as far as their engine told.
        first_token_s, last_token_s: when the first and the newest tokens came here, in seconds of
            ``time.monotonic()``.
    """

    def __init__(
        self, call: GenerationCall, answer_id: str, model: str, groups: Sequence[PromptChoices]
    ) -> None:
        self.answer_id, self.model = answer_id, model
        self.ends: Counter[str] = Counter()
        self.times: dict[int, OutputTimes] = {}
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._call, self._groups = call, groups

    async def note(self, prompt: int, delta: OutputDelta, pauses: Pauses) -> None:
        """Count a delta of the given prompt, and write what it tells of the prompt."""
        if delta.token_ids:
            self.last_token_s = time.monotonic()
            if self.first_token_s is None:
                self.first_token_s = self.last_token_s
        if delta.finish_reason is not None:
            if not self.is_done(prompt, delta):
                self.ends[self._finish_reason(delta.finish_reason)] += 1
            if delta.times is not None:
                self.times[prompt * self._call.params.n + delta.index] = delta.times
        await self._groups[prompt].note(delta, pauses)

    def is_done(self, prompt: int, delta: OutputDelta) -> bool:
        """True where all was told of an output before it ended, so that its end tells nothing."""
        return self._groups[prompt].choices[delta.index].is_done

    def slo_report(self) -> SLOReport | None:
        """Return the report of the output that did worst on its SLO, of those that have ended."""
        reports = [report for group in self._groups for report in group.slo_reports]
        return worst_report(reports) if reports else None

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens so far, in the words of chats and completions."""
        prompt_tokens = sum(len(group.handle.prompt_token_ids) for group in self._groups)
        completion_tokens = sum(group.num_output_tokens for group in self._groups)
        cached_tokens = sum(group.num_cached_tokens for group in self._groups)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        form = self._call.form
        if form is not None and form.reasoning is not None:
            thinking = sum(group.num_thinking_tokens for group in self._groups)
            usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
        return usage

    def _finish_reason(self, reason: FinishReason) -> str:
        """Return a reason as clients are told it, except that calls of tools are not seen yet."""
        is_dropped = self._call.drop_output and reason is FinishReason.STOP
        return FinishReason.LENGTH.value if is_dropped else reason.value

    def _ends_in_calls(self, reason: FinishReason | None) -> None:
        """Note that an output, which ended for a reason or is not awaited any more, calls tools."""
        if reason is not None:
            self.ends -= Counter([reason.value])
        self.ends[TOOL_CALLS] += 1
