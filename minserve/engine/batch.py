"""A batch on its way: what is scheduled, what a device makes of it, and who runs it.

Knows nothing of tensors, so that an engine core can also run on a device that has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from minserve.engine.speculation.proposal import Proposal, Verified
from minserve.errors import MinserveError
from minserve.outputs import TokenLogprob
from minserve.planner.predict.eager import MixedLimit, is_eager
from minserve.planner.predict.perf_model import BatchShape
from minserve.request import Sequence


class Scheduled(NamedTuple):
    """A sequence and how many of its uncomputed tokens this iteration runs.

    It is a tuple (changed copies come from `_replace`), because one is made for each sequence in
    each iteration: a frozen dataclass takes longer to make.

    Attributes:
        proposal: drafted tokens to run, and verify, behind them.
    """

    seq: Sequence
    num_tokens: int
    proposal: Proposal | None = None

    @property
    def drafted(self) -> tuple[int, ...]:
        return () if self.proposal is None else self.proposal.token_ids

    @property
    def samples(self) -> bool:
        """True where the chunk reaches the newest token, so that the next one is sampled."""
        return self.num_tokens == self.seq.num_uncomputed_tokens

    @property
    def start(self) -> int:
        return self.seq.num_computed_tokens

    @property
    def end(self) -> int:
        """The position behind the sequence's own tokens of this iteration; drafts come there."""
        return self.seq.num_computed_tokens + self.num_tokens


def shape_of(batch: SequenceOf[Scheduled], mixed: MixedLimit) -> BatchShape:
    """Return what of a batch decides its time, without the time of drafting.

    Args:
        mixed: as in `is_eager`.
    """
    chunks, num_decodes, total = [], 0, 0
    for seq, num_tokens, proposal in batch:
        # Only a chunk of one token may be a decode.
        if num_tokens == 1 and seq.is_decoding:
            num_decodes += 1
        if proposal is not None:
            num_tokens += len(proposal.token_ids)
        chunks.append((seq.num_computed_tokens, num_tokens))
        total += num_tokens
    return BatchShape.of(chunks, eager=is_eager(len(chunks), num_decodes, total, mixed))


@dataclass(slots=True)
class RunResult:
    """The result of a forward pass for one sequence.

    Attributes:
        sampled: the next tokens, the error that their sampling met, or ``None`` where the
            chunk did not reach the end.
        prompt_logprobs: those of prompt tokens ``start + 1 .. end``, where asked for.
    """

    sampled: Verified | MinserveError | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class RunningBatch(Protocol):
    """A batch that was handed to a device."""

    def results(self) -> Mapping[str, RunResult]:
        """Wait for the end of the batch and return its results by sequence id."""


class BatchRunner(Protocol):
    """Runs the batches of an `EngineCore`, on a model (`ModelRunner`) or a simulated device."""

    @property
    def device(self) -> object:
        """The device itself, whose text is its name."""

    @property
    def is_lost(self) -> bool:
        """True where the device runs nothing any more."""

    def launch(self, batch: SequenceOf[Scheduled]) -> RunningBatch:
        """Hand a batch to the device. Changes no sequence."""


class FollowingBatch(RunningBatch, Protocol):
    """A batch that was handed to a device behind another one."""

    def sample(self, batch: SequenceOf[Scheduled]) -> None:
        """Choose tokens, once those of the batch before are known.

        Args:
            batch: the batch without those sequences that ended by then. The results are for these.
        """


class FollowingRunner(BatchRunner, Protocol):
    """The runner of a device that works behind the host, with two batches at once."""

    def follow(self, batch: SequenceOf[Scheduled], before: RunningBatch) -> FollowingBatch:
        """Hand a batch to the device while the batch before it runs there.

        Args:
            batch: as it will be when that has ended (`Sequence.ahead`). Of sequences that get a
                token there, the device alone knows the newest one.
        """
