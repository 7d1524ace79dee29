"""`LiveOutput`: what turns a sequence's tokens into news for its client.

It appends tokens to the sequence, with their text and stages, and says where the output ends.
What follows from that (blocks, counts, who else runs) is the engine core's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.errors import SLOUnattainableError
from minserve.outputs import OutputDelta, TokenLogprob
from minserve.request import FinishReason, RequestEvent, Sequence
from minserve.slo.attainment import Outcome, SLOReport, report
from minserve.slo.objectives import Standing


class End(NamedTuple):
    """Why an output ends here."""

    reason: FinishReason
    stop_reason: str | int | None = None


class History(NamedTuple):
    """What was told of an output so far.

    Attributes:
        times_s: when each token came, on this engine's clock.
        told_prompt: whether the prompt's log probabilities were, where asked for.
    """

    token_ids: tuple[int, ...] = ()
    times_s: tuple[float, ...] = ()
    told_prompt: bool = False


NO_HISTORY = History()


@dataclass(slots=True)
class LiveOutput:
    """A sequence under way.

    Attributes:
        detokenizer: gives the text; ``None`` where nobody wants it.
        marker_ids: token ids of those stage markers that are one token.
        tail: the newest text, as far back as a stage's marker may begin.
        prompt_logprobs: so far, until they are told.
        told_prompt: True once the client has heard of the prompt.
    """

    seq: Sequence
    detokenizer: IncrementalDetokenizer | None
    marker_ids: Mapping[str, int] = field(default_factory=dict)
    tail: str = ""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    told_prompt: bool = False

    def append(self, token_id: int, now: float) -> tuple[str, End | None]:
        """Append a token. Returns its text, and the end where the token or the text says so."""
        seq, marker = self.seq, None
        seq.token_ids.append(token_id)
        if seq.progress is not None:
            marker = seq.progress.marker
            seq.progress.add_token(now)
        if token_id in seq.request.stop_token_ids:
            return "", End(FinishReason.STOP, token_id)
        text, stop = "", None
        if self.detokenizer is not None:
            text, stop = self.detokenizer.add([token_id])
        if marker is not None and self._passes(marker, token_id, text):
            seq.progress.end_stage()
        if stop is not None:
            return text, End(FinishReason.STOP, stop)
        if seq.num_output_tokens >= seq.request.max_tokens:
            return text, End(FinishReason.LENGTH)
        return text, None

    def recall(self, history: History) -> None:
        """Append what was told before; its text is not told again."""
        seq = self.seq
        for token_id, at in zip(history.token_ids, history.times_s, strict=True):
            self.append(token_id, at)
        seq.events[RequestEvent.FIRST_TOKEN] = history.times_s[0]
        seq.events[RequestEvent.TOKENS] = history.times_s[-1]
        self.told_prompt = history.told_prompt
        # As one that gave up its blocks: it was counted as started when it began.
        seq.num_preemptions += 1

    def _passes(self, marker: str, token_id: int, text: str) -> bool:
        """True where the newest token completes a stage's marker."""
        seen = self.tail + text
        if token_id == self.marker_ids.get(marker) or marker in seen:
            self.tail = ""
            return True
        self.tail = seen[-len(marker) :]
        return False

    def delta(self, **news: object) -> OutputDelta:
        """The news, with what is told of the output in each delta and with the first one."""
        seq, prompt_logprobs = self.seq, None
        if not self.told_prompt and seq.num_output_tokens > 0:
            self.told_prompt = True
            if seq.index == 0 and seq.request.params.prompt_logprobs is not None:
                prompt_logprobs = (None, *self.prompt_logprobs)
        return OutputDelta(
            request_id=seq.request.request_id,
            index=seq.index,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=seq.num_cached_tokens,
            num_draft_tokens=seq.num_draft_tokens,
            num_accepted_tokens=seq.num_accepted_tokens,
            **news,
        )

    def report(self, error: Exception | None) -> SLOReport | None:
        """What was promised and kept; an output that ended in an error attained nothing."""
        seq = self.seq
        if seq.progress is None:
            return None
        admitted = seq.standing is Standing.ADMITTED
        kept = report(seq.request.slo.name, seq.progress, admitted=admitted)
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
