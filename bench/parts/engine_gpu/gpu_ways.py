"""Lets an engine on a CPU go the ways that it goes on a GPU, for dry runs of what only GPUs run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from torch import Tensor

from minserve.config import EngineConfig
from minserve.engine import build
from minserve.engine.core import EngineCore
from minserve.engine.device import transfers
from minserve.engine.device.cuda_graphs import Recorder, Replay
from minserve.engine.device.graph_recording import limits_of, record_all
from minserve.engine.device.runner import model_runner
from minserve.engine.ranks.starting import most_queries
from minserve.models.layers import WeightFormat, WeightPlacement


class Redone(Recorder):
    """Stands in for CUDA graphs: a replay does the work once more."""

    def record(self, work: Callable[[], Tensor]) -> Replay:
        work()
        return work


@contextmanager
def gpu_ways() -> Iterator[None]:
    """While the context lasts, weights are kept as on a GPU, packed ones included, and results come
    behind the host.
    """
    choose = build.choose_placement

    def as_on_a_gpu(*args: Any, **how: Any) -> WeightPlacement:
        return replace(choose(*args, **how), format=WeightFormat.DENSE, packed=True)

    with (
        mock.patch.object(build, "choose_placement", as_on_a_gpu),
        mock.patch.object(transfers, "runs_behind", return_value=True),
    ):
        yield


def follow_gpu_ways(core: EngineCore, config: EngineConfig) -> None:
    """Give an engine graphs if it is to have them, and let it launch each batch behind the one before."""
    core.plans_ahead = core.launches_ahead = True
    if config.cuda_graphs:
        runner = model_runner(core.runner)
        limits = limits_of(config, {runner: most_queries(config)}, core.max_model_len)
        record_all(limits, Redone())
