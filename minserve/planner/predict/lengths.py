"""Guesses how long an output will be, which cannot be known beforehand.

Admission needs the length for memory (the number of blocks that a request will come to hold) and
for time (when its decoding ends and makes room).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Mapping

from minserve.errors import ConfigError
from minserve.request import Sequence

WINDOW = 512
MIN_SAMPLES = 8
# Before a class has finished outputs, and beyond the longest one seen.
FIRST_GUESS = 128


class LengthEstimator(ABC):
    """Guesses output lengths, and learns from finished outputs."""

    def remaining(self, seq: Sequence) -> int:
        """Return how many tokens the output will still have: at least 1, within ``max_tokens``."""
        request = seq.request
        done = len(seq.token_ids) - len(request.prompt_token_ids)
        left = min(self._total(seq, done), request.max_tokens) - done
        return left if left > 1 else 1

    @abstractmethod
    def _total(self, seq: Sequence, done: int) -> int:
        """Return the length in tokens of the whole output, of which ``done`` have come."""

    def finished(self, seq: Sequence) -> None:  # noqa: B027 - not every way of guessing learns
        """Learn from an output that came to its own end."""


class BoundLengths(LengthEstimator):
    """The guess that every output is as long as it may be: ``max_tokens``."""

    def _total(self, seq: Sequence, done: int) -> int:
        return seq.request.max_tokens


class OracleLengths(LengthEstimator):
    """The true lengths, known beforehand; only for reproducing published results.

    Args:
        lengths: number of output tokens by request id.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = lengths

    def _total(self, seq: Sequence, done: int) -> int:
        return self._lengths[seq.request.request_id]


class QuantileLengths(LengthEstimator):
    """The guess that an output is as long as a quantile of the outputs of its class that ended
    lately.

    It takes the quantile of those outputs alone that were longer than this one is now. The client's
    own hint, if there is one, counts instead until the output is longer than it.

    Args:
        quantile: share of the outputs, in (0, 1]; a higher one is more cautious.
    """

    def __init__(self, quantile: float = 0.8) -> None:
        self._quantile = quantile
        self._recent: dict[str, deque[int]] = {}
        self._ordered: dict[str, list[int]] = {}

    def _total(self, seq: Sequence, done: int) -> int:
        slo = seq.request.slo
        if slo is not None and slo.expected_output_tokens is not None:
            if slo.expected_output_tokens > done:
                return slo.expected_output_tokens
            return 2 * done
        ordered = self._ordered.get("" if slo is None else slo.name, ())
        longer = bisect_right(ordered, done)
        num_longer = len(ordered) - longer
        if len(ordered) < MIN_SAMPLES or num_longer == 0:
            # An output that outlived all others is as likely as not to double.
            return max(FIRST_GUESS, 2 * done)
        return ordered[longer + math.ceil(self._quantile * num_longer) - 1]

    def finished(self, seq: Sequence) -> None:
        name = _class_of(seq)
        recent = self._recent.setdefault(name, deque())
        ordered = self._ordered.setdefault(name, [])
        recent.append(seq.num_output_tokens)
        insort(ordered, seq.num_output_tokens)
        if len(recent) > WINDOW:
            ordered.remove(recent.popleft())


def make_length_estimator(name: str) -> LengthEstimator:
    """Return the estimator of a name, ``quantile`` or ``max_tokens``. A caller that knows the true
    lengths makes an `OracleLengths` itself.

    Raises:
        ConfigError: for an unknown name.
    """
    if name == "quantile":
        return QuantileLengths()
    if name == "max_tokens":
        return BoundLengths()
    raise ConfigError(f"unknown length estimator {name!r}; known: quantile, max_tokens")


def _class_of(seq: Sequence) -> str:
    return "" if seq.request.slo is None else seq.request.slo.name
