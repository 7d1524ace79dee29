"""`Proposer` proposes tokens ahead of the target: the interface, and prompt lookup.

A proposer reads sequences and never changes them. What it proposes is only ever a guess:
`Sampler.verify` decides, so that a bad proposal costs time and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import cycle, islice

from minserve.engine.speculation.proposal import Proposal
from minserve.planner.predict.eager import DraftPasses
from minserve.request import Sequence

# Prompt lookup goes by the longest of these ends of the text that stood there before.
LONGEST_NGRAM = 4
SHORTEST_NGRAM = 2


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """The work of a proposer for a sequence's next verification.

    Attributes:
        num_tokens: the number of tokens to draft; 0 only lets the draft model catch up.
        num_catch_up: the most tokens that the draft model may run of those that it lacks.
    """

    seq: Sequence
    num_tokens: int
    num_catch_up: int = 0


class Proposer(ABC):
    """Drafts tokens for decoding sequences.

    Attributes:
        name: its name in ``--speculator``.
        max_tokens: the most tokens drafted for a sequence in one iteration.
    """

    name: str

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    @property
    def passes(self) -> DraftPasses:
        """Which passes of a draft model are CUDA graphs."""
        return DraftPasses()

    @abstractmethod
    def limit(self, seq: Sequence) -> int:
        """Return how many tokens it can propose for a decode now, at most ``max_tokens``."""

    def lag(self, seq: Sequence) -> int:
        """Return how many tokens a draft model has to run before it can propose the next ones."""
        return 0

    @abstractmethod
    def propose(self, wanted: SequenceOf[DraftRequest]) -> dict[str, Proposal]:
        """Return proposals by sequence id; shorter than asked for, or none, if it knows no more."""

    def rehearse(self, num_seqs: int) -> None:  # noqa: B027 - most proposers need no device
        """Draw drafts for so many sequences, which reserves memory and loads kernels."""

    def roll_back(self, seq: Sequence) -> None:  # noqa: B027 - most proposers need not
        """Note that a proposal was verified: drafts beyond the computed tokens are void."""

    def forget(self, seq: Sequence) -> None:  # noqa: B027 - most proposers keep little
        """Note that the sequence ended or gave up its blocks."""


@dataclass(slots=True)
class SpeculationStats:
    """Counts since the start, under vLLM's names.

    Attributes:
        num_drafts: proposals verified.
        num_draft_tokens: tokens in these proposals.
        num_accepted_tokens: accepted ones of these tokens.
        num_accepted_per_pos: accepted tokens at each place of a proposal.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_pos: list[int] = field(default_factory=list)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count one verified proposal."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        missing = num_drafted - len(self.num_accepted_per_pos)
        self.num_accepted_per_pos += [0] * missing
        for place in range(num_accepted):
            self.num_accepted_per_pos[place] += 1


class NgramProposer(Proposer):
    """Prompt lookup: it proposes the tokens that followed the last time the text ended like this.

    Saxena, "Prompt lookup decoding" (2023). It needs no model, and shines where the output
    repeats the prompt: summaries, edits of code, retrieved passages.
    """

    name = "ngram"

    def __init__(self, max_tokens: int) -> None:
        super().__init__(max_tokens)
        self._indices: dict[str, _NgramIndex] = {}

    def limit(self, seq: Sequence) -> int:
        return 0 if self._index(seq).start_of_continuation is None else self.max_tokens

    def propose(self, wanted: SequenceOf[DraftRequest]) -> dict[str, Proposal]:
        proposals = {}
        for one in wanted:
            start = self._index(one.seq).start_of_continuation
            if start is not None and one.num_tokens:
                # Where the continuation reaches the end, the text goes round in circles.
                known = one.seq.token_ids[start : start + one.num_tokens]
                proposals[one.seq.seq_id] = Proposal(tuple(islice(cycle(known), one.num_tokens)))
        return proposals

    def forget(self, seq: Sequence) -> None:
        self._indices.pop(seq.seq_id, None)

    def _index(self, seq: Sequence) -> _NgramIndex:
        index = self._indices.setdefault(seq.seq_id, _NgramIndex())
        index.read(seq.token_ids)
        return index


class _NgramIndex:
    """The places where each n-gram of one sequence last ended.

    Attributes:
        start_of_continuation: position of the token that followed the longest known end of
            the text the last time; ``None`` where no end of it is known.
    """

    __slots__ = ("_ends", "_num_read", "start_of_continuation")

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_read = 0
        self.start_of_continuation: int | None = None

    def read(self, token_ids: list[int]) -> None:
        """Take in the tokens that are new since the last call."""
        for end in range(self._num_read + 1, len(token_ids) + 1):
            found = None
            for size in range(LONGEST_NGRAM, SHORTEST_NGRAM - 1, -1):
                if size <= end:
                    ngram = tuple(token_ids[end - size : end])
                    earlier = self._ends.get(ngram)
                    self._ends[ngram] = end
                    if found is None:
                        found = earlier
            self.start_of_continuation = found
        self._num_read = len(token_ids)
