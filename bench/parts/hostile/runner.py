"""Runs cases against a server: each answered rightly, the neighbour's text unchanged, the next served."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parts.hostile.case import HostileCase, ServedWrong, Target
from parts.hostile.connection_cases import TEN_TOKENS
from parts.hostile.neighbour import RETRY_S, Neighbour, unquiet
from parts.hostile.wire import ANSWER_S

# Cases that run at once, unless they want to be alone.
AT_ONCE = 16


@dataclass(slots=True)
class CaseOutcome:
    """What became of a case.

    Attributes:
        answer: what is wrong with its own answer; ``None`` if nothing is.
        neighbour: what the neighbour felt.
        next_one: why the next request was not served.
        left: what the server still held afterwards.
    """

    case: HostileCase
    answer: str | None = None
    neighbour: str | None = None
    next_one: str | None = None
    left: str | None = None

    @property
    def problems(self) -> list[str]:
        """All that is wrong, in words."""
        parts = (
            ("answer", self.answer),
            ("neighbour", self.neighbour),
            ("next request", self.next_one),
            ("afterwards", self.left),
        )
        return [f"{part}: {problem}" for part, problem in parts if problem]


async def run_cases(
    target: Target,
    cases: Sequence[HostileCase],
    done: Callable[[CaseOutcome], object] = lambda _: None,
) -> list[CaseOutcome]:
    """Run cases beside a neighbour, and return what became of each.

    Cases that may run beside others do so, a few at a time within a family. After every family, and
    every case that runs alone, the neighbour is silent for a moment, and the server must be empty.

    Args:
        done: called with each outcome when it is known, but for what the neighbour felt.
    """
    neighbour = Neighbour(target)
    await neighbour.learn()
    outcomes: list[CaseOutcome] = []
    times: dict[int, tuple[float, float]] = {}
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(outcome: CaseOutcome) -> None:
        async with gate:
            began = time.perf_counter()
            outcome.answer = await _attack(outcome.case, target)
            outcome.next_one = await _next_one(target)
            times[id(outcome)] = began, time.perf_counter()
            done(outcome)

    async with neighbour.running():
        for _, group in itertools.groupby(
            cases, lambda case: case.name if case.alone else case.family
        ):
            batch = [CaseOutcome(case) for case in group]
            outcomes += batch
            await asyncio.gather(*map(one, batch))
            async with neighbour.silent():
                batch[-1].left = await _left(target)
    for outcome in outcomes:
        outcome.neighbour = neighbour.problem_between(
            *times[id(outcome)], may_be_turned_away=outcome.case.crowded
        )
    return outcomes


async def _attack(case: HostileCase, target: Target) -> str | None:
    try:
        return await case.attack(target)
    except ServedWrong as error:
        return str(error)
    # Whatever the server did to the case, the others shall run.
    except Exception as error:
        return f"{type(error).__name__} {error}"


async def _next_one(target: Target) -> str | None:
    """Ask for ten tokens, again while the queue is full of what has just been dropped."""
    try:
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = await target.ask("POST", "/v1/completions", TEN_TOKENS)
            if answer.status != 429 or time.monotonic() > deadline:
                break
            await asyncio.sleep(RETRY_S)
        if answer.status != 200:
            return f"got {answer}"
        tokens = answer.json()["usage"]["completion_tokens"]
        return None if tokens == 10 else f"had {tokens} tokens, not 10"
    except (OSError, TimeoutError, LookupError, ValueError) as error:
        return f"{type(error).__name__} {error}"


async def _left(target: Target) -> str | None:
    try:
        return await unquiet(target)
    except (OSError, TimeoutError) as error:
        return f"{type(error).__name__} {error}"
