"""`DistServeCluster`: prefill and decode on replicas of their own (DistServe, OSDI 2024).

::

    arrive ──► prefill replica ──first token──► handover ──transfer──► decode replica ──► end
               (whole prompts, FCFS)            (KV stays)             (all decodes, always)

Prompts run whole, first come, first served, as many in a batch as its token limit allows.
A prompt's KV stays where it was computed, and takes memory there, until a decode replica has
room for it; then it is copied over the link between them. Decode replicas run all of their
sequences in every iteration. Where one runs out of blocks, the newest is preempted and
computed again on the spot, in chunks behind the decodes.

Dispatch is least-loaded on both sides: by the tokens still to be computed (cached prefixes
counted as done), and by free KV. Links are never shared by two transfers, and whatever the
decode replica has in its prefix index is not sent. Nothing is drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

from minserve.planner.batch_builder import WATERMARK
from minserve.request import Sequence, SequenceState
from minserve.simulator.events import EventLoop
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulated_replica import SimulatedReplica, SimulatedSequence

# NVLink of an A100: 600 GB/s in both directions together (NVIDIA's data sheet).
NVLINK_BYTES_S = 300e9


class PrefillReplica(SimulatedReplica):
    """Runs whole prompts. Whoever has its first token is handed on, its blocks still taken.

    Attributes:
        num_tokens: of prompts that are not computed yet.
    """

    num_tokens = 0

    def submit(self, seq: SimulatedSequence) -> None:
        super().submit(seq)
        self.num_tokens += self._work(seq)

    def load(self, seq: SimulatedSequence) -> int:
        """Tokens to compute until this sequence would have its first token."""
        return self.num_tokens + self._work(seq)

    def _work(self, seq: SimulatedSequence) -> int:
        return seq.num_tokens - self.pool.cached_prefix(seq).num_tokens

    def _idle(self) -> float:
        # Prompts wait for memory until a transfer is done, which may be long.
        self.busy = False
        return math.inf

    def take_prefilled(self) -> list[SimulatedSequence]:
        """Those that have their first token, and are to go on elsewhere."""
        ready, self.running = self.running, []
        for seq in ready:
            del self._by_id[seq.seq_id]
        self.num_tokens = sum(self._work(seq) for seq in self.waiting)
        return ready


class DecodeReplica(SimulatedReplica):
    """Decodes what was prefilled elsewhere.

    Attributes:
        num_coming: sequences whose KV is on its way.
    """

    num_coming = 0

    def has_room(self, seq: SimulatedSequence) -> bool:
        """True where a sequence's KV and its next token fit. Preempted ones go first."""
        if self.waiting or len(self.running) + self.num_coming >= self.max_num_seqs:
            return False
        pool, hit = self.pool, self.pool.cached_prefix(seq)
        needed = -(-seq.num_tokens // pool.block_size) - hit.num_tokens // pool.block_size
        spare = int(WATERMARK * pool.num_blocks) if self.running or self.num_coming else 0
        return needed + hit.num_idle_blocks + spare <= pool.num_free_blocks

    def expect(self, seq: SimulatedSequence) -> int:
        """Take blocks for a sequence. Returns the tokens whose KV is to be sent."""
        num_tokens = seq.num_computed_tokens
        seq.num_computed_tokens = self.pool.attach(seq)
        to_send = num_tokens - seq.num_computed_tokens
        self.pool.grow(seq, to_send)
        seq.num_computed_tokens = num_tokens
        self.num_coming += 1
        return to_send

    def receive(self, seq: SimulatedSequence) -> None:
        """A sequence's KV is there."""
        self.num_coming -= 1
        self.pool.commit(seq)
        self.submit(seq)
        self.waiting.remove(seq)
        self._run(seq)


class DistServeCluster:
    """Turns the clocks of prefill and decode replicas, and moves KV from the former to the latter.

    Args:
        transfer_s: of the KV of one token.
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
        # Prefilled sequences and where their KV lies, first come first.
        self._handover: list[tuple[SimulatedSequence, PrefillReplica]] = []
        self.load: OfferedLoad | None = None

    def arrive(self, *seqs: SimulatedSequence) -> None:
        """A request comes in from outside, with all of its outputs."""
        replica = min(self._prefills, key=lambda one: one.load(seqs[0]))
        for seq in seqs:
            replica.submit(seq)
        self._begin(replica)

    def _begin(self, replica: SimulatedReplica) -> None:
        if replica.busy or not replica.has_work:
            return
        seconds, _ = replica.begin(self._loop.now)
        if seconds < math.inf:
            self._loop.at(self._loop.now + seconds, lambda: self._end(replica))

    def _end(self, replica: SimulatedReplica) -> None:
        for seq in replica.end(self._loop.now):
            self.load.ended(seq)
        if isinstance(replica, PrefillReplica):
            self._handover += [(seq, replica) for seq in replica.take_prefilled()]
        self._hand_over()
        self._begin(replica)

    def _hand_over(self) -> None:
        """Send the first ones in line to the decode replicas that have most free KV."""
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
    """Takes the blocks over from a sequence, which may get others then."""
    held = Sequence(seq.request, state=SequenceState.RUNNING)
    held.token_ids, held.block_hashes = seq.token_ids, seq.block_hashes
    held.block_table, seq.block_table = seq.block_table, []
    return held
