"""`Flight`: a request on its way through replicas, with all that its client was told.

What a client has is what counts: a token that a replica has made but not delivered is made
again by the next one, and one that was delivered is never delivered again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from minserve.controller.messages import Resumed, Submit
from minserve.controller.prefixes import Chunks, chunks_of
from minserve.outputs import OutputDelta
from minserve.request import FinishReason, Request, Sequence


@dataclass(slots=True)
class OutputSoFar:
    """Of one output, what was delivered."""

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    told_prompt: bool = False
    ended: bool = False


@dataclass(slots=True, kw_only=True)
class Flight:
    """One request.

    Attributes:
        request: its arrival on the controller's clock.
        outputs: by index.
        sequence: the request as estimates of lengths want it.
        chunks: of its prompt, as a `PrefixMap` knows them.
        replica: who runs it; ``None`` while nobody does.
        tried: replicas that could not promise its SLO.
        moving_to: where it goes once its replica has given it back.
        num_losses: replicas that were lost under it since it last brought a token.
    """

    request: Request
    outputs: list[OutputSoFar]
    sequence: Sequence
    chunks: Chunks
    replica: int | None = None
    tried: set[int] = field(default_factory=set)
    moving_to: int | None = None
    num_losses: int = 0

    @classmethod
    def of(cls, request: Request) -> Flight:
        """A request that has yet to begin."""
        outputs = [OutputSoFar() for _ in range(request.params.n)]
        chunks = chunks_of(request.prompt_token_ids, request.cache_salt)
        return cls(request=request, outputs=outputs, sequence=Sequence(request), chunks=chunks)

    @property
    def has_begun(self) -> bool:
        """True where its client has heard of it."""
        return any(output.token_ids or output.ended for output in self.outputs)

    @property
    def num_open(self) -> int:
        """Outputs that have not ended."""
        return sum(not output.ended for output in self.outputs)

    @property
    def num_tokens(self) -> int:
        """Of the prompt and of the longest open output."""
        longest = max(len(o.token_ids) for o in self.outputs if not o.ended)
        return len(self.request.prompt_token_ids) + longest

    def note(self, delta: OutputDelta, now: float) -> None:
        """A delta is delivered."""
        self.num_losses = 0
        output = self.outputs[delta.index]
        output.token_ids += delta.token_ids
        output.times_s += [now] * len(delta.token_ids)
        output.told_prompt |= delta.prompt_logprobs is not None
        output.ended = delta.finish_reason is not None

    def submit(self, now: float) -> Submit:
        """What a replica is told, for it to go on where the client stands."""
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


class FlightHandle:
    """A flight as its client's handler sees it; the face of the engine's `RequestHandle`."""

    def __init__(self, flight: Flight, prompt: str | None, abort: Callable[[str], None]) -> None:
        self._abort = abort
        self._deltas: asyncio.Queue[OutputDelta] = asyncio.Queue()
        self._num_open = flight.num_open
        self.request_id = flight.request.request_id
        self.prompt = prompt
        self.prompt_token_ids = flight.request.prompt_token_ids

    def put(self, delta: OutputDelta) -> None:
        """Deliver."""
        self._deltas.put_nowait(delta)

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while self._num_open:
            delta = await self._deltas.get()
            self._num_open -= delta.finish_reason is not None
            yield delta

    def abort(self) -> None:
        """Stop the request. Does nothing if it ended."""
        self._abort(self.request_id)


def ending(flight: Flight, reason: FinishReason, error: Exception | None) -> list[OutputDelta]:
    """The last deltas of a flight that ends for a reason of the controller's."""
    return [
        OutputDelta(flight.request.request_id, index, finish_reason=reason, error=error)
        for index, output in enumerate(flight.outputs)
        if not output.ended
    ]
