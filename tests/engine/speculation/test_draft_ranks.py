"""Draft models beside a target that is divided among ranks: divided too, or whole on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import parity
import pytest
import torch
from test_draft_models import EMBEDDING, HEAD, HEAD_IDS, Tensors, variant

from minserve.errors import ConfigError
from minserve.models.base import CausalLM
from minserve.models.draft_model import DraftModel, lend_embeddings, load_draft_model
from minserve.models.finding.source import ModelSource, find_model
from minserve.models.layers import WeightPlacement
from minserve.models.ranks import Ranks
from parts.parity.passes import chunked_logits, join_parts, load, make_runner
from parts.parity.rank_threads import RankThreads

PLACEMENT = WeightPlacement.choose(torch.device("cpu"), "float32")
IDS = torch.tensor([400, 5, 3, 255, 42, 511, 256])


def borrow(tensors: Tensors) -> None:
    del tensors[EMBEDDING]


def borrow_and_trim(tensors: Tensors) -> None:
    del tensors[EMBEDDING], tensors[HEAD]
    tensors[HEAD_IDS] = IDS


def trim(tensors: Tensors) -> None:
    del tensors[HEAD]
    tensors[HEAD_IDS] = IDS


DRAFTS: dict[str, tuple[Callable[[Tensors], None], int]] = {
    "whole": (lambda _: None, 0),
    "borrowed embeddings": (borrow, 0),
    "trimmed head": (trim, len(IDS)),
    "borrowed embeddings and trimmed head": (borrow_and_trim, len(IDS)),
}


@pytest.fixture(scope="module")
def two() -> Iterator[RankThreads]:
    with RankThreads(2) as threads:
        yield threads


def logits(model: CausalLM) -> torch.Tensor:
    return chunked_logits(make_runner(model, PLACEMENT), parity.prompts((21,)), 8)[0]


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_model_is_the_same_divided_or_whole_on_one_rank(
    name: str, two: RankThreads, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    change, rows = DRAFTS[name]
    folder = variant(tiny_llama_dir, tmp_path / "draft", change, draft_vocab_size=rows)
    source = find_model(str(folder))
    alone = load_draft_model(source, load(tiny_llama_dir)[0], PLACEMENT)
    want = logits(alone.model)

    targets = two.on_each(lambda ranks: load(tiny_llama_dir, ranks=ranks)[0])
    divided = two.on_each(
        lambda ranks: load_draft_model(source, targets[ranks.rank], PLACEMENT, ranks)
    )
    parts = [one.model for one in divided]
    assert (logits(join_parts(two, parts, PLACEMENT)) - want).abs().max() < 1e-4

    first = two.on_each(lambda ranks: whole_on_the_first(ranks, source, targets[ranks.rank]))[0]
    assert first is not None
    assert torch.equal(logits(first.model), want)
    for one in (first, *divided):
        assert (one.head_token_ids is None) is (rows == 0)


def whole_on_the_first(ranks: Ranks, source: ModelSource, target: CausalLM) -> DraftModel | None:
    if ranks.rank == 0:
        return load_draft_model(source, target, PLACEMENT)
    return lend_embeddings(source, target)


def test_a_draft_model_that_does_not_divide_is_refused(
    tiny_llama_dir: Path, tiny_opt_dir: Path
) -> None:
    target = load(tiny_llama_dir)[0]
    with pytest.raises(ConfigError, match=r"4 attention heads, .* may be 1, 2, 4$"):
        load_draft_model(find_model(str(tiny_opt_dir)), target, PLACEMENT, Ranks(0, 3))
