"""`find_replicas`: searches for the smallest number of replicas that serves a rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minserve.workload.capacity import LEVEL


@dataclass(slots=True)
class Sizing:
    """The result of a search for a number of replicas.

    Attributes:
        attainment: by number of replicas, the attainment, as far as it was measured.
        level: share of requests that counts as enough.
        complete: False if the search was cut short.
    """

    attainment: dict[int, float] = field(default_factory=dict)
    level: float = LEVEL
    complete: bool = False

    @property
    def replicas(self) -> int | None:
        """The smallest number that attains the level; ``None`` if none was found."""
        enough = [number for number, share in self.attainment.items() if share >= self.level]
        return min(enough, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values; ``one_fewer``: attainment with one replica less."""
        shares = {number: round(share, 4) for number, share in sorted(self.attainment.items())}
        number = self.replicas
        return {
            "replicas": number,
            "attainment": None if number is None else shares[number],
            "one_fewer": None if number is None else shares.get(number - 1),
            "level": self.level,
            "complete": self.complete,
            "tried": {str(number): share for number, share in shares.items()},
        }


def find_replicas(
    measure: Callable[[int], float],
    start: int,
    most: int,
    *,
    level: float = LEVEL,
    into: Sizing | None = None,
) -> Sizing:
    """Search for the number: bracket it by doubling and halving, then bisect.

    Attainment is assumed to rise with the number of replicas. It is measured for the number that
    is found and, unless this is 1, for one replica fewer.

    Args:
        measure: returns the attainment with so many replicas.
        start: the first number that is tried.
        most: the largest number that is tried.
        into: collects the results, so that they are kept if the search is interrupted.
    """
    result = Sizing(level=level) if into is None else into

    def attains(number: int) -> bool:
        if number not in result.attainment:
            result.attainment[number] = measure(number)
        return result.attainment[number] >= level

    high = min(max(1, start), most)
    low = 0
    if attains(high):
        while high > 1 and attains(high // 2):
            high //= 2
        low = high // 2
    else:
        while high < most and not attains(high):
            low, high = high, min(2 * high, most)
        if not attains(high):
            low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if attains(middle) else (middle, high)
    result.complete = True
    return result
