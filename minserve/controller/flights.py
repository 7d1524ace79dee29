"""`Flight`: a request on its way through replicas, with all that its client was sent.

What the client has decides. The next replica makes a token again if the lost replica made but
did not deliver it; a token that was delivered is never delivered again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from minserve.controller.messages import Resumed, Submit
from minserve.controller.prefixes import Chunks, chunks_of
from minserve.engine.delta_queue import DeltaQueue
from minserve.engine.tasks import TaskWatch
from minserve.outputs import OutputDelta
from minserve.request import FinishReason, Request, Sequence


@dataclass(slots=True)
class OutputSoFar:
    """The part of an output that was delivered.

    Attributes:
        times_s: when each token was delivered, in seconds on the controller's clock.
        told_prompt: the log probabilities of the prompt were delivered.
    """

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    told_prompt: bool = False
    ended: bool = False


@dataclass(slots=True, kw_only=True)
class Flight:
    """A request with its state in the controller.

    Attributes:
        request: its arrival is in seconds on the controller's clock.
        outputs: the delivered part of each output, by its index.
        seq: the request in the form that estimators of output lengths take.
        chunks: hashes of its prompt, as `PrefixMap` takes them.
        replica: number of the replica that runs it; ``None`` while none does.
        tried: replicas that could not promise its SLO.
        moving_to: the replica that gets it once the present replica has given it back.
        num_losses: replicas lost while they ran it, since it last brought a token.
    """

    request: Request
    outputs: list[OutputSoFar]
    seq: Sequence
    chunks: Chunks
    replica: int | None = None
    tried: set[int] = field(default_factory=set)
    moving_to: int | None = None
    num_losses: int = 0

    @classmethod
    def of(cls, request: Request) -> Flight:
        """Return the flight of a request of which nothing was delivered."""
        outputs = [OutputSoFar() for _ in range(request.params.n)]
        chunks = chunks_of(request.prompt_token_ids, request.cache_salt)
        return cls(request=request, outputs=outputs, seq=Sequence(request), chunks=chunks)

    @property
    def has_begun(self) -> bool:
        """True if the client has a token of the request, or knows that an output ended."""
        return any(output.token_ids or output.ended for output in self.outputs)

    @property
    def num_open(self) -> int:
        """The number of outputs that have not ended."""
        return sum(not output.ended for output in self.outputs)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the prompt and of the longest output that has not ended."""
        longest = max(len(o.token_ids) for o in self.outputs if not o.ended)
        return len(self.request.prompt_token_ids) + longest

    def expects(self, index: int) -> bool:
        """Return whether it has an output of this index that has not ended."""
        return 0 <= index < len(self.outputs) and not self.outputs[index].ended

    def note(self, delta: OutputDelta, now: float) -> None:
        """Record that a delta was delivered at time ``now``."""
        self.num_losses = 0
        output = self.outputs[delta.index]
        output.token_ids += delta.token_ids
        output.times_s += [now] * len(delta.token_ids)
        output.told_prompt |= delta.prompt_logprobs is not None
        output.ended = delta.finish_reason is not None

    def submit(self, now: float) -> Submit:
        """Return the message that makes a replica continue where the client's outputs stand."""
        return Submit(
            request=self.request,
            age_s=now - self.request.arrival_s,
            outputs={
                index: Resumed(
                    token_ids=tuple(output.token_ids),
                    ages_s=tuple(now - at for at in output.times_s),
                    told_prompt=output.told_prompt,
                )
                for index, output in enumerate(self.outputs)
                if not output.ended
            },
        )


class FlightHandle(DeltaQueue):
    """A flight as its client's handler sees it, with the interface of `RequestHandle`."""

    def __init__(
        self,
        flight: Flight,
        prompt: str | None,
        abort: Callable[[str], None],
        complete: Callable[[str], None],
        watch: TaskWatch,
    ) -> None:
        super().__init__(flight.num_open)
        self._abort, self._complete, self._watch = abort, complete, watch
        self.request_id = flight.request.request_id
        self.prompt = prompt
        self.prompt_token_ids = flight.request.prompt_token_ids
        self.targets = flight.request.targets
        self._flight = flight

    @property
    def replica(self) -> int | None:
        """The number of the replica that has the request, or had it last."""
        return self._flight.replica

    def put(self, delta: OutputDelta) -> None:
        """Deliver a delta to the handler that waits for it."""
        self._watch.note(delta)
        super().put(delta)

    def abort(self) -> None:
        """Stop the request. Does nothing if it has ended."""
        self._abort(self.request_id)

    def complete(self) -> None:
        """End its outputs as if they had come to their ends, since nothing more of them is wanted."""
        self._complete(self.request_id)


def ending(flight: Flight, reason: FinishReason, error: Exception | None) -> list[OutputDelta]:
    """Return the last deltas of a flight that the controller itself ends."""
    return [
        OutputDelta(flight.request.request_id, index, finish_reason=reason, error=error)
        for index, output in enumerate(flight.outputs)
        if not output.ended
    ]
