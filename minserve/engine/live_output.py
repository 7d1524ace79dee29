"""`LiveOutput`: turns a sequence's tokens into news for its client.

It appends tokens to the sequence, with their text and stages, and says where the output ends.
All that follows from them (blocks, counts, the other sequences) is the engine core's work. The
core knows it by the protocol `Output`, so that outputs without a client can do with less.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from minserve.engine.speculation.proposal import SampledToken
from minserve.engine.structures.guide import Guide, unheld
from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.errors import SLOUnattainableError
from minserve.outputs import OutputDelta, OutputTimes, TokenLogprob
from minserve.request import FinishReason, RequestEvent, Sequence
from minserve.slo.attainment import Outcome, SLOReport, report
from minserve.slo.objectives import Standing
from minserve.slo.task_call import report_task


class End(NamedTuple):
    """Why an output ends here."""

    reason: FinishReason
    stop_reason: str | int | None = None


LENGTH_END = End(FinishReason.LENGTH)


class History(NamedTuple):
    """The part of an output that its client was told before.

    Attributes:
        times_s: when each token came, on this engine's clock.
        told_prompt: True if the prompt's log probabilities were told, where asked for.
    """

    token_ids: tuple[int, ...] = ()
    times_s: tuple[float, ...] = ()
    told_prompt: bool = False


NO_HISTORY = History()


class Output(Protocol):
    """An output under way, as the engine core knows it."""

    @property
    def seq(self) -> Sequence:
        """Its sequence, to which the output alone appends tokens."""

    def append(self, tokens: SequenceOf[SampledToken], now: float) -> tuple[int, End | None]:
        """Append tokens as far as the output goes.

        Returns:
            the number of tokens that were appended, and the end where it has come.
        """

    def add_prompt_logprobs(self, logprobs: SequenceOf[TokenLogprob]) -> None:
        """Take log probabilities of prompt tokens; called before their chunk counts as computed."""

    def news(self) -> OutputDelta | None:
        """Return what the last call of `append` brought; ``None`` if there is no client to tell."""

    def last_news(self, end: End, error: Exception | None) -> OutputDelta:
        """Return the last delta of the output.

        Args:
            error: the error that ends it, where that is the reason. It brings no tokens then.
        """


class _Unsent(NamedTuple):
    """New tokens of an output with their text, until a delta tells them."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None


_NOTHING = _Unsent()


@dataclass(slots=True)
class LiveOutput:
    """An output that a client reads.

    Attributes:
        detokenizer: gives the text; ``None`` where the text is not wanted.
        marker_ids: token ids of those stage markers that are one token.
        tail: the newest text, as far back as a stage's marker may begin.
        prompt_logprobs: those that are known so far, until they are told.
        told_prompt: True once the client has heard of the prompt.
    """

    seq: Sequence
    detokenizer: IncrementalDetokenizer | None
    marker_ids: Mapping[str, int] = field(default_factory=dict)
    tail: str = ""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    told_prompt: bool = False
    _unsent: _Unsent = _NOTHING

    def append(self, tokens: SequenceOf[SampledToken], now: float) -> tuple[int, End | None]:
        """Append tokens as far as the output goes, and keep them for the next delta."""
        text, end = self._append(tokens[0].token_id, now)
        num = 1
        while end is None and num < len(tokens):
            more_text, end = self._append(tokens[num].token_id, now)
            text, num = text + more_text, num + 1
        self._unsent = _Unsent(
            text,
            tuple([token.token_id for token in tokens[:num]]),
            None
            if tokens[0].logprob is None
            else tuple([token.logprob for token in tokens[:num] if token.logprob is not None]),
        )
        return num, end

    def add_prompt_logprobs(self, logprobs: SequenceOf[TokenLogprob]) -> None:
        """Take log probabilities of prompt tokens, unless the client has heard of the prompt."""
        if self.seq.num_computed_tokens == 0:
            # The prompt is computed again from its beginning.
            self.prompt_logprobs.clear()
        if not self.told_prompt:
            self.prompt_logprobs += logprobs

    def recall(self, history: History) -> None:
        """Append tokens that were told before; their text is not told again."""
        seq = self.seq
        for token_id, at in zip(history.token_ids, history.times_s, strict=True):
            self._append(token_id, at)
        seq.events[RequestEvent.FIRST_TOKEN] = history.times_s[0]
        seq.events[RequestEvent.TOKENS] = history.times_s[-1]
        self.told_prompt = history.told_prompt
        # It counts as preempted: as a start it was counted when it began.
        seq.num_preemptions += 1

    def news(self) -> OutputDelta:
        """Return a delta of the tokens that the last call of `append` brought."""
        unsent, self._unsent = self._unsent, _NOTHING
        return self._delta(unsent)

    def last_news(self, end: End, error: Exception | None) -> OutputDelta:
        """Return the last delta, with all text that was held back and the report of the SLO."""
        seq, (unsent, self._unsent) = self.seq, (self._unsent, _NOTHING)
        wants_text = self.detokenizer is not None and end.reason is not FinishReason.ERROR
        if self.detokenizer is not None and wants_text and not isinstance(end.stop_reason, str):
            unsent = unsent._replace(text=unsent.text + self.detokenizer.flush())
        return self._delta(unsent)._replace(
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            error=error,
            slo=self._report(error),
            times=times_of(seq),
        )

    def _append(self, token_id: int, now: float) -> tuple[str, End | None]:
        """Append a token.

        Returns:
            its text, and the end where the token or the text says so.
        """
        seq, progress, marker, guide = self.seq, self.seq.progress, None, self.seq.guide
        is_end = token_id in seq.request.stop_token_ids and (guide is None or guide.can_end)
        seq.token_ids.append(token_id)
        if progress is not None:
            marker = progress.marker
            progress.add_token(now)
        text, stop = "", None
        if is_end:
            if self.detokenizer is not None and seq.request.params.include_stop_str_in_output:
                text, _ = self.detokenizer.add([token_id])
            return text, End(FinishReason.STOP, token_id)
        may_end, is_over = (True, False) if guide is None else _follow(seq, guide, token_id)
        if self.detokenizer is not None:
            text, stop = self.detokenizer.add([token_id], may_end)
        if progress is not None and marker is not None and self._passes(marker, token_id, text):
            progress.end_stage()
        if stop is not None:
            return text, End(FinishReason.STOP, stop)
        if is_over:
            return text, End(FinishReason.STOP)
        if seq.num_output_tokens >= seq.request.max_tokens:
            return text, LENGTH_END
        return text, None

    def _passes(self, marker: str, token_id: int, text: str) -> bool:
        """Return True where the newest token completes a stage's marker."""
        seen = self.tail + text
        if token_id == self.marker_ids.get(marker) or marker in seen:
            self.tail = ""
            return True
        self.tail = seen[-len(marker) :]
        return False

    def _delta(self, unsent: _Unsent) -> OutputDelta:
        """Return a delta of new tokens; the first one tells of the prompt too."""
        seq = self.seq
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        if not self.told_prompt and seq.num_output_tokens > 0:
            self.told_prompt = True
            if seq.index == 0 and seq.request.params.prompt_logprobs is not None:
                prompt_logprobs = (None, *self.prompt_logprobs)
        return OutputDelta(
            request_id=seq.request.request_id,
            index=seq.index,
            text=unsent.text,
            token_ids=unsent.token_ids,
            logprobs=unsent.logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=seq.num_cached_tokens,
            num_draft_tokens=seq.num_draft_tokens,
            num_accepted_tokens=seq.num_accepted_tokens,
        )

    def _report(self, error: Exception | None) -> SLOReport | None:
        """Return what was promised and kept. An output that ended in an error attained nothing."""
        seq = self.seq
        if seq.progress is None or seq.request.slo is None:
            return None
        admitted = seq.standing is Standing.ADMITTED
        kept = report(seq.request.slo.name, seq.progress, admitted=admitted)
        if (task := seq.request.task) is not None:
            last_s = seq.events.get(RequestEvent.TOKENS, seq.request.arrival_s)
            kept = replace(kept, task=report_task(task, last_s - seq.request.arrival_s))
        if error is None:
            return kept
        refused = isinstance(error, SLOUnattainableError)
        outcome = Outcome.REJECTED if refused else Outcome.FAILED
        return replace(
            kept,
            outcome=outcome,
            attained=False,
            attained_mean=False,
            admitted=kept.admitted and not refused,
        )


def _follow(seq: Sequence, guide: Guide, token_id: int) -> tuple[bool, bool]:
    """Tell an output's structure of a token.

    Returns:
        whether the output may end behind it, and whether it must.

    Raises:
        InvalidRequestError: if the structure cannot be held any more.
    """
    stands = guide.advance(token_id)
    if (error := unheld(seq)) is not None:
        raise error
    return stands


def times_of(seq: Sequence) -> OutputTimes:
    """Return how far a sequence has come, and when."""
    arrival_s, at = seq.request.arrival_s, seq.events.get

    def since(event: RequestEvent) -> float | None:
        time_s = at(event)
        return None if time_s is None else time_s - arrival_s

    return OutputTimes(
        since(RequestEvent.FIRST_START),
        since(RequestEvent.FIRST_TOKEN),
        since(RequestEvent.TOKENS),
        seq.num_output_tokens,
        seq.num_preemptions,
    )
