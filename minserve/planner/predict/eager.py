"""The one rule which batches run eagerly on a device that has CUDA graphs.

The code that runs batches (`minserve.engine.device.paged_model`), the code that plans them, and the
code that predicts how long they take all use it. In an eager pass the host launches each kernel,
and the GPU may wait for the host; a graph launches all of its kernels at once.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple


class MixedLimit(NamedTuple):
    """The largest batches with a prefill that are graphs; by default there are none.

    Attributes:
        max_tokens: the most tokens of such a batch.
        max_chunks: the most prefill chunks in it.
    """

    max_tokens: int = 0
    max_chunks: int = 0


NO_MIXED = MixedLimit()


def is_eager(num_seqs: int, num_decodes: int, num_tokens: int, mixed: MixedLimit) -> bool:
    """Return True if a batch runs eagerly: a sequence does not decode, and no graph holds it.

    Graphs of decodes are recorded for as many sequences, tokens, and tokens of a sequence as a core
    may run. So no batch of decodes is too large for them.

    Args:
        num_seqs: number of sequences in the batch.
        num_decodes: number of these that decode, verifications of drafts included.
        num_tokens: number of tokens in the batch, drafted ones included.
        mixed: the largest batches with a prefill that are graphs.
    """
    num_chunks = num_seqs - num_decodes
    return num_chunks > 0 and (num_tokens > mixed.max_tokens or num_chunks > mixed.max_chunks)


class DraftPasses(NamedTuple):
    """Which passes of a draft model are graphs: those that draft, and some that catch up first.

    Attributes:
        mixed: the largest passes with a prefill that are graphs; ``None`` where nothing is one, so
            that all passes are alike.
        most_decode_tokens: up to so many tokens of a sequence count as a decode.
    """

    mixed: MixedLimit | None = None
    most_decode_tokens: int = 1

    def is_eager(self, lengths: SequenceOf[int]) -> bool:
        """Return True if a pass runs eagerly that runs so many tokens of each sequence."""
        if self.mixed is None:
            return False
        num_decodes = sum(length <= self.most_decode_tokens for length in lengths)
        return is_eager(len(lengths), num_decodes, sum(lengths), self.mixed)
