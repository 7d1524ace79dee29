"""`find_replicas`: how many replicas a rate takes. A search over whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minserve.workload.capacity import LEVEL


@dataclass(slots=True)
class Sizing:
    """What a search found.

    Attributes:
        attainment: by number of replicas, as far as it was measured.
        level: that counts as enough.
        complete: False where the search was cut short.
    """

    attainment: dict[int, float] = field(default_factory=dict)
    level: float = LEVEL
    complete: bool = False

    @property
    def replicas(self) -> int | None:
        """The smallest number that attains the level; ``None`` where none was found."""
        enough = [number for number, share in self.attainment.items() if share >= self.level]
        return min(enough, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``one_fewer`` is the attainment with one replica less."""
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
    """Bracket the number by doubling and halving, then bisect.

    Attainment is taken to rise with the number of replicas; of the number that is found and
    of one fewer it is measured.

    Args:
        measure: attainment with so many replicas.
        start: where the search begins.
        most: replicas that are tried.
        into: where to keep results, for whoever wants them if this is interrupted.
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
