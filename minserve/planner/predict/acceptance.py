"""Estimates how likely a drafted token is to be accepted, from each sequence's own record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minserve.request import Sequence

# What is believed before anything was seen, and its weight in drafted tokens.
FIRST_GUESS = 0.6
FIRST_WEIGHT = 8.0
# A new sequence is believed to be like all others, with this weight in drafted tokens.
SHARED_WEIGHT = 4.0
# Records fade with every token, so that estimates follow the text, and a sequence that was given up
# is tried again: its own record fades within some tens of tokens, that of all within thousands.
OWN_FADE = 1 - 1 / 48
SHARED_FADE = 1 - 1 / 4096
MOST = 0.98
# Batches wait for the decode that has least in hand, so that what a few verifications bring is
# what can be planned with.
NUM_VERIFICATIONS = 2


@dataclass(slots=True)
class _Record:
    """Fading counts of drafted tokens that were looked at, and of those accepted."""

    tried: float = 0.0
    accepted: float = 0.0

    def add(self, tried: int, accepted: int, fade: float) -> None:
        kept = fade ** max(1, tried)
        self.tried = kept * self.tried + tried
        self.accepted = kept * self.accepted + accepted


class AcceptanceEstimator:
    """The chance, for each sequence, that a drafted token is accepted if those before it were.

    Tokens behind a rejected one were never looked at and count for nothing.
    """

    def __init__(self) -> None:
        self._shared = _Record()
        self._asked = _Record()
        self._own: dict[str, _Record] = {}

    @property
    def shared_rate(self) -> float:
        """The acceptance rate over all sequences, lately; between 0 and `MOST`."""
        shared = self._shared
        accepted = shared.accepted + FIRST_WEIGHT * FIRST_GUESS
        return min(MOST, accepted / (shared.tried + FIRST_WEIGHT))

    def rate(self, seq: Sequence) -> float:
        """Return the acceptance rate of a sequence, between 0 and `MOST`."""
        own = self._own.get(seq.seq_id)
        if own is None:
            return self.shared_rate
        accepted = own.accepted + SHARED_WEIGHT * self.shared_rate
        return min(MOST, accepted / (own.tried + SHARED_WEIGHT))

    @property
    def coverage(self) -> float:
        """The share of decodes for which any token could be drafted, lately."""
        asked = self._asked
        return (asked.accepted + FIRST_WEIGHT) / (asked.tried + FIRST_WEIGHT)

    def asked(self, could_draft: bool) -> None:
        """Note whether tokens could be drafted for a decode that was considered for speculation."""
        self._asked.add(1, int(could_draft), SHARED_FADE)

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Note how many tokens were drafted for a sequence, perhaps none, and how many were
        accepted.
        """
        tried = min(num_accepted + 1, num_drafted)
        self._own.setdefault(seq.seq_id, _Record()).add(tried, num_accepted, OWN_FADE)
        self._shared.add(tried, num_accepted, SHARED_FADE)

    def keep_only(self, seq_ids: Iterable[str]) -> None:
        """Forget all other sequences."""
        for seq_id in self._own.keys() - set(seq_ids):
            del self._own[seq_id]


def expected_tokens(acceptance: float, length: int) -> float:
    """Return the mean number of tokens that a verification of ``length`` drafted tokens brings:
    those accepted, and one more.
    """
    if acceptance >= 1.0:
        return length + 1.0
    return (1.0 - acceptance ** (length + 1)) / (1.0 - acceptance)


def cautious_tokens(
    acceptance: float, length: int, num_verifications: float = NUM_VERIFICATIONS
) -> float:
    """Return the mean of `expected_tokens`, less its standard error over so many verifications.

    The number of tokens is at least j + 1 with probability a^j, so that its second moment is the
    sum of (2j + 1) a^j.
    """
    mean = expected_tokens(acceptance, length)
    square = sum((2 * j + 1) * acceptance**j for j in range(length + 1))
    variance = max(0.0, square - mean * mean)
    return max(1.0, mean - (variance / num_verifications) ** 0.5)
