"""`DistServeCluster`: prefill and decode on separate replicas (DistServe, OSDI 2024).

::

    arrive ──► prefill replica ──first token──► handover ──transfer──► decode replica ──► end
               (whole prompts, FCFS)            (KV stays)             (all decodes, always)

Prompts run whole, first come, first served, with as many in a batch as its token limit allows.
A prompt's KV stays on its prefill replica, and takes memory there, until a decode replica has
room for it; then it is copied over the link between them. Decode replicas run all of their
sequences in every iteration. If a decode replica runs out of blocks, its newest sequence is
preempted and computed again on the same replica, in chunks after the decodes.

Dispatch is least-loaded on both sides: by tokens still to be computed on the prefill side
(cached prefixes count as done), and by free KV on the decode side. Two transfers never share a
link, and blocks that the decode replica has in its prefix index are not sent. No tokens are
drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

from minserve.planner.batching.batch_builder import WATERMARK
from minserve.request import Sequence, SequenceState
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulated_replica import SimulatedReplica
from minserve.simulator.simulated_sequence import SimulatedSequence

# NVLink of an A100: 600 GB/s in both directions together (NVIDIA's data sheet).
NVLINK_BYTES_S = 300e9


class PrefillReplica(SimulatedReplica):
    """Runs whole prompts. A sequence with its first token is handed on, its blocks still taken.

    Attributes:
        num_tokens: tokens of prompts that are not computed yet.
    """

    num_tokens = 0

    def submit(self, seq: SimulatedSequence) -> None:
        super().submit(seq)
        self.num_tokens += self._work(seq)

    def load(self, seq: SimulatedSequence) -> int:
        """Return the tokens to compute until this sequence would have its first token."""
        return self.num_tokens + self._work(seq)

    def _work(self, seq: Sequence) -> int:
        return seq.num_tokens - self.pool.cached_prefix(seq).num_tokens

    def _idle(self) -> float:
        # Prompts wait for memory until a transfer ends, which may take long.
        self.busy = False
        return math.inf

    def take_prefilled(self) -> list[SimulatedSequence]:
        """Remove and return the sequences that have their first token, to continue elsewhere."""
        ready = [self._sequences.pop((s.request.request_id, s.index)) for s in self.core.running]
        for seq in ready:
            self.core.table.remove(seq)
        self.num_tokens = sum(self._work(seq) for seq in self.core.waiting)
        return ready


class DecodeReplica(SimulatedReplica):
    """Decodes sequences that were prefilled on another replica.

    Attributes:
        num_coming: sequences whose KV is on its way.
    """

    num_coming = 0

    def has_room(self, seq: SimulatedSequence) -> bool:
        """Return whether a sequence's KV and next token fit. Preempted sequences go before it."""
        core = self.core
        if core.waiting or len(core.running) + self.num_coming >= core.max_num_seqs:
            return False
        pool, hit = self.pool, self.pool.cached_prefix(seq)
        needed = -(-seq.num_tokens // pool.block_size) - hit.num_tokens // pool.block_size
        spare = int(WATERMARK * pool.num_blocks) if core.running or self.num_coming else 0
        return needed + hit.num_idle_blocks + spare <= pool.num_free_blocks

    def expect(self, seq: SimulatedSequence) -> int:
        """Take blocks for a sequence, and return the number of tokens whose KV has to be sent."""
        num_tokens = seq.num_computed_tokens
        seq.num_computed_tokens = self.pool.attach(seq)
        to_send = num_tokens - seq.num_computed_tokens
        self.pool.grow(seq, to_send)
        seq.num_computed_tokens = num_tokens
        self.num_coming += 1
        return to_send

    def receive(self, seq: SimulatedSequence) -> None:
        """Let a sequence run here, since its KV has arrived."""
        self.num_coming -= 1
        self.pool.commit(seq)
        self.submit(seq)
        self.core.table.run(seq)


class DistServeCluster:
    """Runs prefill and decode replicas on the clock, and moves KV from the former to the latter.

    Args:
        transfer_s: seconds to send the KV of one token.
    """

    def __init__(
        self,
        loop: EventLoop,
        prefills: SequenceOf[PrefillReplica],
        decodes: SequenceOf[DecodeReplica],
        transfer_s: float,
    ) -> None:
        self._loop, self._prefills, self._decodes = loop, prefills, decodes
        self._transfer_s = transfer_s
        self.replicas = [*prefills, *decodes]
        # Prefilled sequences and the replicas that hold their KV, in order of arrival.
        self._handover: list[tuple[SimulatedSequence, PrefillReplica]] = []
        self.load: OfferedLoad | None = None

    @property
    def _load(self) -> OfferedLoad:
        assert self.load is not None, "set before the first request arrives"
        return self.load

    def arrive(self, *seqs: SimulatedSequence) -> None:
        """Take a new request, with all of its outputs, and give it to a prefill replica."""
        replica = min(self._prefills, key=lambda one: one.load(seqs[0]))
        for seq in seqs:
            replica.submit(seq)
        self._begin(replica)

    def _begin(self, replica: SimulatedReplica) -> None:
        if replica.busy or not replica.has_work:
            return
        seconds, _ = replica.begin()
        if seconds < math.inf:
            self._loop.at(self._loop.now + seconds, lambda: self._end(replica))

    def _end(self, replica: SimulatedReplica) -> None:
        for seq in replica.end():
            self._load.ended(seq)
        if isinstance(replica, PrefillReplica):
            self._handover += [(seq, replica) for seq in replica.take_prefilled()]
        self._hand_over()
        self._begin(replica)

    def _hand_over(self) -> None:
        """Send the first sequences in line to the decode replicas with the most free KV."""
        while self._handover:
            seq, source = self._handover[0]
            targets = [one for one in self._decodes if one.has_room(seq)]
            if not targets:
                return
            self._handover.pop(0)
            self._send(seq, source, max(targets, key=lambda one: one.pool.num_free_blocks))

    def _send(self, seq: SimulatedSequence, source: PrefillReplica, target: DecodeReplica) -> None:
        held = _held(seq)
        seconds = target.expect(seq) * self._transfer_s
        self._loop.at(self._loop.now + seconds, lambda: self._arrived(seq, held, source, target))

    def _arrived(
        self,
        seq: SimulatedSequence,
        held: Sequence,
        source: PrefillReplica,
        target: DecodeReplica,
    ) -> None:
        source.pool.release(held)
        target.receive(seq)
        self._begin(target)
        self._begin(source)


def _held(seq: SimulatedSequence) -> Sequence:
    """Move a sequence's blocks to a new object, so that the sequence can get other blocks."""
    held = Sequence(seq.request, state=SequenceState.RUNNING)
    held.token_ids, held.block_hashes = seq.token_ids, seq.block_hashes
    held.block_table, seq.block_table = seq.block_table, []
    return held
