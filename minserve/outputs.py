"""What an engine gives back: deltas while a request runs, a `RequestOutput` at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

from minserve.errors import GenerationError, MinserveError
from minserve.request import FinishReason
from minserve.slo.attainment import SLOReport, worst_report


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one token at one position.

    Attributes:
        token_id: the token that was sampled (or stands in the prompt).
        logprob: its natural log probability under the model's raw distribution.
        rank: 1 for the most likely token.
        top: ``(token_id, logprob)`` of the most likely tokens, best first; as many
            as the request asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


def acceptance(num_draft_tokens: int, num_accepted_tokens: int) -> dict[str, int | float | None]:
    """What became of drafts, for JSON; the rate is ``None`` where nothing was drafted."""
    rate = num_accepted_tokens / num_draft_tokens if num_draft_tokens else None
    return {
        "draft_tokens": num_draft_tokens,
        "accepted_tokens": num_accepted_tokens,
        "rate": rate,
    }


class OutputTimes(NamedTuple):
    """How an output went on, in seconds since its request arrived; ``None`` where it did not.

    Attributes:
        started_s: when it first got blocks and ran; ``None`` too where that was on a replica that
            was lost.
        first_token_s, last_token_s: when its first and its newest token came.
        num_tokens: how many tokens it has.
        num_preemptions: how often it gave up its blocks.
    """

    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_tokens: int = 0
    num_preemptions: int = 0

    @property
    def mean_tpot_s(self) -> float | None:
        """Mean seconds per token behind the first one; ``None`` before the second token."""
        if self.first_token_s is None or self.last_token_s is None or self.num_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_tokens - 1)


class OutputDelta(NamedTuple):
    """News of one output of one request.

    A tuple (changed copies by `_replace`), since one is made for every token: a frozen
    dataclass takes longer to make.

    Attributes:
        request_id, index: which output of which request.
        text: new text; characters split over tokens and beginnings of stop strings
            are held back until they are decided.
        token_ids: new tokens (a token may arrive with its text still held back).
        logprobs: one per new token where asked for, else ``None``.
        finish_reason: set on the last delta of this output.
        stop_reason: the stop string or stop token id that ended it, else ``None``.
        prompt_logprobs: on the first delta of output 0 where asked for; ``None`` for
            the prompt's first token.
        num_cached_tokens: prompt tokens that a prefix hit saved (first delta on).
        num_draft_tokens, num_accepted_tokens: of this output, drafted so far and of these
            accepted.
        error: on the last delta where ``finish_reason`` is ERROR.
        slo: on the last delta, what was promised and kept; ``None`` without an SLO.
        times: on the last delta that an engine makes.
    """

    request_id: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which has no use here
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    error: Exception | None = None
    slo: SLOReport | None = None
    times: OutputTimes | None = None

    def raise_if_failed(self) -> None:
        """Raise the error that ended this output, if one did.

        Raises:
            MinserveError: the error itself; one of another kind as a `GenerationError`.
        """
        if isinstance(self.error, MinserveError):
            raise self.error
        if self.error is not None:
            raise GenerationError(str(self.error))


class ReplicaReport(TypedDict):
    """How a replica stands, for people and programs.

    Attributes:
        state: the value of a `ReplicaState`.
        for_s: seconds since it entered that state.
        pid, host: of its process; ``None`` where none is connected.
        requests: number of requests that are with it now.
        routed, lost: requests sent to it, and processes of it lost, since the start.
    """

    replica: int
    state: str
    for_s: float
    pid: int | None
    host: str | None
    requests: int
    routed: int
    lost: int


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One finished output of a request.

    Attributes:
        num_draft_tokens, num_accepted_tokens: drafted by speculation, and of these accepted.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        prompt: the text as given, or the chat template's rendering; ``None`` where
            token ids were given.
        outputs: ``n`` of them, in order.
        num_cached_tokens: prompt tokens that a prefix hit saved.
        slo: what was promised and what was kept, of the output that fared worst;
            ``None`` without an SLO.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    slo: SLOReport | None = None

    def add(self, delta: OutputDelta) -> None:
        """Append one delta of this request."""
        out = self.outputs[delta.index]
        out.text += delta.text
        out.token_ids.extend(delta.token_ids)
        out.num_draft_tokens = delta.num_draft_tokens
        out.num_accepted_tokens = delta.num_accepted_tokens
        if delta.logprobs is not None:
            out.logprobs = (out.logprobs or []) + list(delta.logprobs)
        if delta.finish_reason is not None:
            out.finish_reason = delta.finish_reason.value
            out.stop_reason = delta.stop_reason
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        if delta.slo is not None:
            self.slo = delta.slo if self.slo is None else worst_report((self.slo, delta.slo))
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
