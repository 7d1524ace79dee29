"""A device that takes known times, and no time, for the batches of a profile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minserve import Engine
from minserve.engine.profile import profile_cache, profiler, refinement
from minserve.engine.profile.profile_cache import Profile
from minserve.engine.profile.profile_design import ProfileBatch
from minserve.engine.profile.profiler import Survey
from minserve.engine.profile.workbench import Workbench

SETTINGS = {"device": "cpu", "dtype": "float32", "threads": 1, "token_budget": 128, "max_num_seqs": 16,
            "num_blocks": 120, "block_size": 8}  # fmt: skip
NUM_BATCHES = 30


def truth(batch: ProfileBatch) -> float:
    """Seconds of a device whose longest batches are not measured in idle moments."""
    return 0.01 + 0.006 * batch.shape.tokens + 1e-5 * batch.shape.context_tokens


class Device:
    """Takes known times for batches, and no time.

    Attributes:
        runs: the batches that ran.
        slowdown: of the next run, by its batch.
    """

    def __init__(self) -> None:
        self.runs: list[ProfileBatch] = []
        self.slowdown: Callable[[ProfileBatch], float] = lambda _: 1.0

    @classmethod
    def installed(cls, patch: pytest.MonkeyPatch) -> Device:
        """In place of what every workbench runs on."""
        found = cls()
        patch.setattr(Workbench, "time", lambda _, batch: found.time(batch))
        patch.setattr(Workbench, "prepare", lambda *_: True)
        return found

    def time(self, batch: ProfileBatch) -> float:
        self.runs.append(batch)
        return self.slowdown(batch) * truth(batch)


def start_afresh(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """An empty cache, a small design, and engines that refine when they are idle."""
    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.setattr(refinement, "FIRST_IDLE_S", 2.0)
    patch.setattr(profiler, "NUM_BATCHES", NUM_BATCHES)


def never() -> bool:
    return False


def rough(engine: Engine, num_batches: int = 12) -> Profile:
    """What a start measures of a design, and keeps."""
    survey = Survey(engine._core, "tiny")
    for batch in survey.batches[:num_batches]:
        survey.measure(batch)
    profile = survey.profile(allowed_s=3.0)
    profile_cache.save(profile)
    engine._core.planner.model = profile.new_model()
    return profile
