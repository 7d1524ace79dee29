"""`Party`: the outputs of one request, as admission sees them.

A request attains its SLO only if every one of its outputs does: that is what its client is told
(`minserve.slo.attainment.worst_report`), and what a load test counts. So a promise belongs to the
request:

- its outputs are decided on together, as one candidate; each has a slot, a place in its tier and
  blocks of its own, while the value is that of the request, however many there are;
- as soon as one of them begins, all of them are promised;
- if the SLO of one is broken, or the promise to one cannot be kept, all that are left are best
  effort: nothing that they could still do would make the request attain its SLO. Outputs that ended
  in time before keep their own reports;
- a request is refused only while none of its outputs has begun, here or elsewhere.

With prefix caching the prompt is computed once. The other outputs begin when its full blocks are
there (`BatchBuilder.start`) and share them. Without it, or if the log probabilities of the prompt
are asked for, each output computes and holds a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from minserve.planner.plan import MemoryView, PlannerView, shared_blocks
from minserve.request import Request, Sequence, SequenceState
from minserve.slo.objectives import Standing


@dataclass(eq=False, slots=True)
class Party:
    """The outputs of a request that are left; at least one.

    Attributes:
        request: the request.
        standing: the planner's promise to the request.
        live: all outputs that are left.
        settled: those of them that decode under a promise.
        open: the others.
    """

    request: Request
    standing: Standing
    live: list[Sequence]
    settled: list[Sequence]
    open: list[Sequence]

    def is_broken(self, broken: Container[str]) -> bool:
        """Return True if the request's SLO can no longer be attained.

        Args:
            broken: ids of the sequences whose SLO is broken.
        """
        return any(seq.seq_id in broken for seq in self.live)

    @property
    def awaits_answer(self) -> bool:
        """True if a request that would rather be refused than be late has not begun."""
        return (
            self.standing is Standing.PENDING
            and self.request.refuses_delay
            and len(self.live) == self.request.params.n
            and not any(seq.has_begun for seq in self.live)
        )


def partition(view: PlannerView, broken: Container[str]) -> tuple[list[Sequence], list[Party]]:
    """Return the sequences without siblings that decode under a promise, and the other requests
    with an SLO.

    A request whose SLO is broken is left out, unless it has yet to hear that it is refused.

    Args:
        broken: ids of the sequences whose SLO is broken.
    """
    alone: list[Sequence] = []
    parties: list[Party] = []
    by_id: dict[str, Party] = {}
    for seq in (*view.running, *view.waiting):
        progress, request = seq.progress, seq.request
        if progress is None:
            continue
        settled = seq.standing is Standing.ADMITTED and seq.is_decoding
        if request.params.n == 1:
            if settled:
                if seq.seq_id not in broken:
                    alone.append(seq)
                continue
        elif (party := by_id.get(request.request_id)) is not None:
            party.live.append(seq)
            (party.settled if settled else party.open).append(seq)
            continue
        own = ([seq], []) if settled else ([], [seq])
        parties.append(Party(request, seq.standing, [seq], *own))
        if request.params.n > 1:
            by_id[request.request_id] = parties[-1]
    return alone, [one for one in parties if not one.is_broken(broken) or one.awaits_answer]


def starts_of(
    party: Party, memory: MemoryView, cached_tokens: Callable[[Sequence], int]
) -> list[int]:
    """Return, for each open output, how many of its tokens are computed when its prefill begins.

    The output that is ahead computes the prompt for all of them.
    """
    waiting = SequenceState.WAITING
    shared = shared_blocks(party.open[0], memory) * memory.block_size
    if not shared:
        return [
            cached_tokens(seq) if seq.state is waiting else seq.num_computed_tokens
            for seq in party.open
        ]
    carried = any(seq.state is not waiting for seq in party.live)
    starts = []
    for seq in party.open:
        if seq.state is not waiting:
            starts.append(seq.num_computed_tokens)
        elif carried and seq.num_output_tokens == 0:
            # Not looked up: hashing the prompt once for each of them would take too long.
            starts.append(shared)
        else:
            starts.append(max(cached_tokens(seq), shared if carried else 0))
            carried = True
    return starts


def spared_blocks(
    parties: Iterable[Party], memory: MemoryView, remaining: Mapping[str, int]
) -> dict[str, int]:
    """Return by sequence id how many blocks of the prompt are counted for a sibling instead.

    Args:
        remaining: number of tokens that each sequence will still have, by its id. Of the outputs
            that decode, the one that goes on for longest is counted for the shared blocks.
    """
    spared: dict[str, int] = {}
    for party in parties:
        if len(party.live) == 1:
            continue
        num = shared_blocks(party.live[0], memory)
        if num:
            carrier = _carrier(party, remaining)
            for seq in party.live:
                if seq is not carrier and _shares(seq, carrier, num):
                    spared[seq.seq_id] = num
    return spared


def _carrier(party: Party, remaining: Mapping[str, int]) -> Sequence:
    """Return the output that the shared blocks of a request are counted for."""
    if party.settled:
        return max(party.settled, key=lambda seq: remaining[seq.seq_id])
    running = (seq for seq in party.open if seq.state is SequenceState.RUNNING)
    return next(running, party.open[0])


def _shares(seq: Sequence, carrier: Sequence, num_blocks: int) -> bool:
    """Return True if the first blocks of both outputs are, or will be, the same ones.

    Outputs that began apart may have computed the same prompt twice.
    """
    if seq.state is SequenceState.WAITING:
        return True
    return seq.block_table[:num_blocks] == carrier.block_table[:num_blocks]
