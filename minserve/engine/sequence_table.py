"""`SequenceTable`: the outputs under way in an engine, and who of them waits and who runs.

It moves sequences between its lists. Blocks, times and counts are the engine core's work.
"""

from __future__ import annotations

from bisect import insort

from minserve.engine.live_output import Output
from minserve.request import Sequence, SequenceState, by_rank


class SequenceTable:
    """The books of an engine core.

    Attributes:
        waiting, running: sequences in rank order (priority, then arrival).
        outputs: all outputs under way, by sequence id.
    """

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.outputs: dict[str, Output] = {}
        self._by_request: dict[str, list[str]] = {}
        # Requests of which an output has begun and is gone, while others are still under way.
        self._begun: set[str] = set()

    @property
    def request_ids(self) -> list[str]:
        """The ids of all requests with an output under way."""
        return list(self._by_request)

    def of_request(self, request_id: str) -> list[Output]:
        """Return the outputs of a request that are under way; none if the id is unknown."""
        return [self.outputs[seq_id] for seq_id in self._by_request.get(request_id, ())]

    def has_begun(self, request_id: str) -> bool:
        """Return True if an output of a request runs or has a token, or did before it ended."""
        if request_id in self._begun:
            return True
        return any(output.seq.has_begun for output in self.of_request(request_id))

    def add(self, output: Output) -> None:
        """Add an output whose sequence waits."""
        seq = output.seq
        self.outputs[seq.seq_id] = output
        self._by_request.setdefault(seq.request.request_id, []).append(seq.seq_id)
        insort(self.waiting, seq, key=by_rank)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, whether it waits or runs."""
        (self.running if seq.state is SequenceState.RUNNING else self.waiting).remove(seq)
        del self.outputs[seq.seq_id]
        request_id = seq.request.request_id
        siblings = self._by_request[request_id]
        siblings.remove(seq.seq_id)
        if not siblings:
            del self._by_request[request_id]
            self._begun.discard(request_id)
        elif seq.has_begun:
            self._begun.add(request_id)

    def run(self, seq: Sequence) -> None:
        """Let a waiting sequence run."""
        self.waiting.remove(seq)
        seq.state = SequenceState.RUNNING
        insort(self.running, seq, key=by_rank)

    def wait(self, seq: Sequence) -> None:
        """Let a running sequence wait again."""
        self.running.remove(seq)
        seq.state = SequenceState.WAITING
        insort(self.waiting, seq, key=by_rank)
