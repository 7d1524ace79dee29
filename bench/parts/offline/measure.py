"""The measurements of an engine inside its process. It needs only Python.

Decode speed is computed from the difference between runs with one and with 128 output tokens, so
that no prefill is in it. A mixed step is an iteration over 16 decodes and one prompt of 64 tokens.
In each step one prompt is handed in, for as many steps as the decodes have tokens left, and the
time of all this work is divided by the number of steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

BATCHES = (1, 8, 32)
PROMPT, OUTPUT, PREFILL = 128, 128, 1024
# Sizes of the mixed step.
DECODES, CONTEXT, NEW_PROMPT = 16, 100, 64
MIXED_STEPS = 32

Prompt = list[int]
_rng = random.Random(0)


class Driver(Protocol):
    """An engine that is measured.

    Attributes:
        version: version of its package.
        runs_mixed: true if it has `mixed`.
    """

    version: str
    runs_mixed: bool

    def generate(self, prompts: list[Prompt], tokens_out: int) -> None:
        """Run prompts together, greedily, for exactly ``tokens_out`` tokens each."""

    def mixed(self, decodes: list[Prompt], prompts: list[Prompt]) -> float:
        """Run mixed steps.

        First bring all of `decodes` to their first token. Then hand in one of `prompts` in each
        step, until each of the decodes has as many more tokens as there are prompts.

        Returns:
            seconds from the first of these prompts until everything is done.
        """


def measure(
    driver: Driver, repeats: int, on_repeat: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Return for each row one value per repeat: tokens per second, or mixed steps per second.

    Args:
        on_repeat: called after each repeat.
    """
    driver.generate([random_prompt(PROMPT)], 4)
    rates: dict[str, list[float]] = {f"decode_b{batch}": [] for batch in BATCHES}
    rates["prefill_1024"] = []
    if driver.runs_mixed:
        rates["mixed_step"] = []
    for _ in range(repeats):
        for batch in BATCHES:
            first, whole = (_timed(driver, batch, PROMPT, n) for n in (1, OUTPUT))
            rates[f"decode_b{batch}"].append(batch * (OUTPUT - 1) / (whole - first))
        rates["prefill_1024"].append(PREFILL / _timed(driver, 1, PREFILL, 1))
        if driver.runs_mixed:
            rates["mixed_step"].append(MIXED_STEPS / _mixed_s(driver))
        on_repeat()
    return rates


def random_prompt(length: int) -> Prompt:
    """Return ids of ordinary tokens, which every vocabulary has."""
    return [_rng.randrange(100, 40_000) for _ in range(length)]


def _timed(driver: Driver, batch: int, tokens_in: int, tokens_out: int) -> float:
    prompts = [random_prompt(tokens_in) for _ in range(batch)]
    started = time.perf_counter()
    driver.generate(prompts, tokens_out)
    return time.perf_counter() - started


def _mixed_s(driver: Driver) -> float:
    decodes = [random_prompt(CONTEXT - MIXED_STEPS // 2) for _ in range(DECODES)]
    return driver.mixed(decodes, [random_prompt(NEW_PROMPT) for _ in range(MIXED_STEPS)])
