"""What graphs will take of a device's memory, and that wrong ones are not used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from padded_backend import PaddedBackend, Rerun
from test_cuda_graphs import load, paged
from torch import Tensor

from minserve.config import EngineConfig
from minserve.engine.device.cuda_graphs import DecodeGraphs, GraphLimits, Recorder, Replay
from minserve.engine.device.graph_recording import (
    free_beside_graphs,
    graph_bytes,
    limits_of,
    num_graphs,
    record_all,
)
from minserve.engine.device.mixed_graphs import ModelGraphs
from minserve.engine.device.paged_model import PagedModel
from minserve.planner.predict.eager import NO_MIXED, MixedLimit

LIMITS = GraphLimits(10, 24, 160, (1, 4), MixedLimit(100, 3))


class Memory(Recorder):
    """The first graph takes memory for what it computes, and each one takes some for itself."""

    def __init__(self, shared: int, own: int) -> None:
        self.free = 10**9
        self._shared, self._own = shared, own

    def record(self, work: Callable[[], Tensor]) -> Replay:
        self.free -= self._shared + self._own
        self._shared = 0
        return work


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PagedModel:
    return paged(load(tiny_llama_dir), PaddedBackend)


@pytest.mark.parametrize("limits", [LIMITS, GraphLimits(10, 24, 160)], ids=["all", "decodes"])
def test_a_few_graphs_tell_what_all_of_them_take(model: PagedModel, limits: GraphLimits) -> None:
    few, everything = Memory(10**6, 300), Memory(10**6, 300)
    before = everything.free
    found = graph_bytes({model: limits}, few, lambda: few.free)
    recorded = ModelGraphs(model, everything, limits).num_recorded
    assert found == before - everything.free
    assert recorded == num_graphs(model, limits)
    if limits is LIMITS:
        assert (before - few.free - 10**6) // 300 < recorded


def test_memory_that_comes_free_meanwhile_is_no_negative_need(model: PagedModel) -> None:
    memory = Memory(-(10**6), -5)
    assert graph_bytes({model: LIMITS}, memory, lambda: memory.free) == 0


def test_right_graphs_are_used(model: PagedModel) -> None:
    record_all({model: LIMITS}, Rerun())
    assert isinstance(model.graphs, ModelGraphs)
    assert model.graphs.mixed == LIMITS.mixed


@pytest.mark.parametrize("wrong", ["decodes", "prefills", "nan"])
def test_wrong_graphs_are_given_up_with_one_line(
    tiny_llama_dir: Path,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind = DecodeGraphs if wrong == "decodes" else ModelGraphs
    forward = kind.forward

    def off(self: object, chunks: list, num_decodes: int, *rest: object) -> Tensor:
        hidden = forward(self, chunks, num_decodes, *rest)
        is_wrong = kind is DecodeGraphs or num_decodes < len(chunks)
        if is_wrong:
            hidden = hidden.clone()
            hidden[-1] *= float("nan") if wrong == "nan" else 1.5
        return hidden

    monkeypatch.setattr(kind, "forward", off)
    hurt = paged(load(tiny_llama_dir), PaddedBackend)
    with caplog.at_level(logging.WARNING):
        record_all({hurt: LIMITS}, Rerun())
    assert len(caplog.records) == 1
    if wrong == "decodes":
        assert hurt.graphs is None
    else:
        assert hurt.graphs is not None
        assert hurt.graphs.mixed == NO_MIXED


def test_every_model_has_limits_of_its_own(model: PagedModel) -> None:
    config = EngineConfig(max_num_seqs=20, token_budget=300)
    other = PagedModel(model.model, model.backend, model.kv, model.block_size, model.device)
    limits = limits_of(config, {model: 5, other: 1}, max_seq_len=90)
    assert limits[model].max_queries == (1, 5)
    assert limits[other].max_queries == (1,)
    assert {own.mixed for own in limits.values()} == {MixedLimit(300, 16)}


def test_what_a_dry_run_keeps_counts_as_taken(
    model: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the few graphs are thrown away, and with them what torch kept for the next batch."""
    memory, kept = Memory(10**6, 300), 10**8
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory.free - kept, 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(memory, "free", 10**9 + kept))
    found = free_beside_graphs({model: LIMITS}, memory, torch.device("cuda"))
    assert found == 10**9 - kept - 10**6 - 300 * num_graphs(model, LIMITS)
