"""Drafted tokens, and the tokens that come of verifying them. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from minserve.outputs import TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor


class SampledToken(NamedTuple):
    """A chosen token, with its log probability where the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens drafted for a sequence.

    Attributes:
        token_ids: at least one.
        probabilities: per drafted token, the distribution that it was drawn from, float32
            ``[>= vocab]``, summing to 1. ``None`` where no chance was involved other than
            the target's own draw: greedy drafts, prompt lookup, seeded requests.
    """

    token_ids: tuple[int, ...]
    probabilities: tuple[Tensor, ...] | None = None

    @property
    def drawn_from(self) -> tuple[Tensor, ...]:
        """The ``probabilities``, for a proposal that was drafted by chance."""
        assert self.probabilities is not None, "they were not drafted by chance"
        return self.probabilities


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of a proposal.

    Attributes:
        tokens: the accepted ones and, where the target has one, its own choice behind them.
        num_accepted: the number of drafted tokens that were accepted.
    """

    tokens: tuple[SampledToken, ...]
    num_accepted: int
