"""Which draft models are taken, trimmed heads, borrowed embeddings, and the sampled distribution."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from speculating import GREEDY, PROMPTS, SEEDED, SETTINGS, essence, make_engine, outputs_of
from test_verification import surprise

from minserve import Engine, SamplingParams
from minserve.engine.speculation import verification
from minserve.engine.speculation.proposal import Proposal
from minserve.errors import ConfigError, ModelLoadError

EMBEDDING, HEAD, HEAD_IDS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.token_ids"
UNSEEDED = SamplingParams(temperature=0.9, max_tokens=24)
PENALTIES = replace(SEEDED, repetition_penalty=1.2, presence_penalty=0.3)

Tensors = dict[str, torch.Tensor]


def variant(
    source: Path,
    folder: Path,
    change: Callable[[Tensors], None] = lambda _: None,
    **config: Any,
) -> Path:
    """A copy of a model folder with other tensors or settings."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture(scope="module")
def plain(tiny_llama_pair: Any) -> Engine:
    return make_engine(tiny_llama_pair)


@pytest.fixture(scope="module")
def head_ids(plain: Engine) -> torch.Tensor:
    """Half of what the target says, and many other tokens, in no order."""
    said = {t for o in outputs_of(plain) + outputs_of(plain, params=SEEDED) for t in o.token_ids}
    ids = sorted(said)[::2] + [t for t in range(5, 1000, 7) if t not in said]
    return torch.tensor(ids)[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def test_the_log_names_the_draft_model(
    tiny_llama_pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    Engine(str(tiny_llama_pair.target), **SETTINGS, draft_model=str(tiny_llama_pair.draft))
    (line,) = [one for one in caplog.messages if "ready in" in one]
    assert f", draft model {tiny_llama_pair.draft.name}," in line


# -- refused -----------------------------------------------------------------------------


def refuse(pair: Any, error: type[Exception], match: str | None, **settings: Any) -> None:
    with pytest.raises(error, match=match):
        Engine(str(pair.target), **SETTINGS, **settings)


def test_a_draft_with_a_vocabulary_of_another_size_is_refused(
    tiny_llama_pair: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    refuse(tiny_llama_pair, ConfigError, "vocabulary", draft_model=str(tiny_llama_dir))
    folder = variant(tiny_llama_dir, tmp_path / "draft")
    (folder / "tokenizer.json").unlink()
    refuse(tiny_llama_pair, ConfigError, "vocabulary of 512", draft_model=str(folder))


def test_all_tensors_that_a_draft_lacks_are_named_together(
    tiny_llama_pair: Any, tmp_path: Path
) -> None:
    def without_norms(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("layernorm.weight")]:
            del tensors[name]

    folder = variant(tiny_llama_pair.draft, tmp_path / "draft", without_norms)
    refuse(tiny_llama_pair, ModelLoadError, r"\d tensors missing", draft_model=str(folder))


def test_a_draft_with_another_vocabulary_of_the_same_size_is_refused(
    tiny_llama_pair: Any, tmp_path: Path
) -> None:
    folder = variant(tiny_llama_pair.draft, tmp_path / "draft")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[500:502]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(tokenizer))
    refuse(tiny_llama_pair, ConfigError, "another vocabulary", draft_model=str(folder))


def test_drafting_for_another_model_needs_a_draft_model(tiny_llama_pair: Any) -> None:
    refuse(tiny_llama_pair, ConfigError, "needs a draft_model", speculator="draft")


@pytest.mark.parametrize("speculator", ["ngram", "off"])
def test_a_draft_model_that_would_not_be_used_is_refused(
    tiny_llama_pair: Any, speculator: str
) -> None:
    draft = str(tiny_llama_pair.draft)
    refuse(tiny_llama_pair, ConfigError, "does not use", draft_model=draft, speculator=speculator)


@pytest.mark.parametrize("settings", [{"speculator": "medusa"}, {"max_speculation": 0}], ids=str)
def test_settings_out_of_range_are_refused(tiny_llama_pair: Any, settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make_engine(tiny_llama_pair, **settings)


def test_a_missing_draft_model_is_refused(tiny_llama_pair: Any, tmp_path: Path) -> None:
    refuse(tiny_llama_pair, ModelLoadError, None, draft_model=str(tmp_path / "nowhere"))


def trim(ids: torch.Tensor, *dropped: str) -> Callable[[Tensors], None]:
    """Trim a tied head to some tokens; leave tensors out of the file."""

    def change(tensors: Tensors) -> None:
        rows = ids.long().clamp(0, len(tensors[EMBEDDING]) - 1).flatten()
        tensors[HEAD], tensors[HEAD_IDS] = tensors[EMBEDDING][rows].contiguous(), ids
        for name in dropped:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([5, 6, 7, 6]),
        torch.tensor([5, 6, 1024, 8]),
        torch.tensor([5, 6, -1, 8]),
        torch.tensor([5.0, 6.0, 7.0, 8.0]),
        torch.tensor([[5, 6], [7, 8]]),
        torch.tensor([], dtype=torch.int64),
    ],
    ids=["twice", "too large", "negative", "fractions", "two dimensions", "none"],
)
def test_head_ids_that_are_not_different_tokens_are_refused(
    tiny_llama_pair: Any, tmp_path: Path, ids: torch.Tensor
) -> None:
    settings = {"draft_vocab_size": 4, "tie_word_embeddings": False}
    folder = variant(tiny_llama_pair.draft, tmp_path / "draft", trim(ids), **settings)
    refuse(tiny_llama_pair, ModelLoadError, r"token_ids|lm_head", draft_model=str(folder))


def test_a_trimmed_head_without_its_ids_is_refused(tiny_llama_pair: Any, tmp_path: Path) -> None:
    change = trim(torch.tensor([5, 6, 7, 8]), HEAD_IDS)
    settings = {"draft_vocab_size": 4, "tie_word_embeddings": False}
    folder = variant(tiny_llama_pair.draft, tmp_path / "draft", change, **settings)
    refuse(tiny_llama_pair, ModelLoadError, "token_ids", draft_model=str(folder))


@pytest.mark.parametrize("num_ids", [3, 5])
def test_a_head_with_ids_for_more_or_fewer_rows_is_refused(
    tiny_llama_pair: Any, tmp_path: Path, num_ids: int
) -> None:
    def change(tensors: Tensors) -> None:
        trim(torch.arange(5, 9))(tensors)
        tensors[HEAD_IDS] = torch.arange(5, 5 + num_ids)

    settings = {"draft_vocab_size": 4, "tie_word_embeddings": False}
    folder = variant(tiny_llama_pair.draft, tmp_path / "draft", change, **settings)
    refuse(tiny_llama_pair, ModelLoadError, None, draft_model=str(folder))


def test_a_trimmed_head_that_is_tied_to_all_embeddings_is_refused(
    tiny_llama_pair: Any, tmp_path: Path
) -> None:
    change = trim(torch.arange(5, 105), HEAD)
    settings = {"draft_vocab_size": 100, "tie_word_embeddings": True}
    folder = variant(tiny_llama_pair.draft, tmp_path / "draft", change, **settings)
    refuse(tiny_llama_pair, ModelLoadError, None, draft_model=str(folder))


# -- trimmed heads and borrowed embeddings -----------------------------------------------


def record_proposals(engine: Engine) -> list[Proposal]:
    """Everything that the engine's proposer proposes from now on."""
    found: list[Proposal] = []
    original = engine._core.proposer.propose

    def propose(wanted: Any) -> dict[str, Proposal]:
        proposals = original(wanted)
        found.extend(proposals.values())
        return proposals

    engine._core.proposer.propose = propose
    return found


UNTIED = {"tie_word_embeddings": False}
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "own head": ("draft", ()),
    "head from its own embeddings": ("draft", (HEAD,)),
    "the target's layers, embeddings borrowed": ("target", (HEAD, EMBEDDING)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_trimmed_head_proposes_its_tokens_alone_and_loses_nothing(
    tiny_llama_pair: Any, plain: Engine, head_ids: torch.Tensor, tmp_path: Path, form: str
) -> None:
    role, dropped = FORMS[form]
    folder = variant(
        getattr(tiny_llama_pair, role), tmp_path / "draft", trim(head_ids.int(), *dropped),
        draft_vocab_size=len(head_ids), **UNTIED,
    )  # fmt: skip
    engine = make_engine(tiny_llama_pair, "draft", draft_model=str(folder))
    proposals = record_proposals(engine)
    for params in (GREEDY, SEEDED, PENALTIES):
        assert essence(outputs_of(engine, params=params)) == essence(
            outputs_of(plain, params=params)
        )
    mixed = [GREEDY, UNSEEDED, SEEDED, PENALTIES, UNSEEDED, GREEDY]
    outputs_of(engine, params=mixed)
    allowed = set(head_ids.tolist())
    assert {t for p in proposals for t in p.token_ids} <= allowed
    by_chance = [p for p in proposals if p.probabilities is not None]
    assert 0 < len(by_chance) < len(proposals)
    outside = torch.ones(len(by_chance[0].probabilities[0]), dtype=torch.bool)
    outside[head_ids] = False
    for proposal in by_chance:
        for token, q in zip(proposal.token_ids, proposal.probabilities, strict=True):
            assert q[token] > 0
            assert q[outside].sum() == 0
            assert q.sum().item() == pytest.approx(1.0, abs=1e-5)
    stats = engine.speculation_stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


def test_a_head_from_the_embeddings_proposes_what_the_same_head_stored_does(
    tiny_llama_pair: Any, head_ids: torch.Tensor, tmp_path: Path
) -> None:
    found = []
    for name, dropped in (("stored", ()), ("derived", (HEAD,))):
        folder = variant(
            tiny_llama_pair.draft, tmp_path / name, trim(head_ids, *dropped),
            draft_vocab_size=len(head_ids), **UNTIED,
        )  # fmt: skip
        engine = make_engine(tiny_llama_pair, "draft", draft_model=str(folder))
        proposals = record_proposals(engine)
        outputs_of(engine)
        found.append([p.token_ids for p in proposals])
    assert found[0] == found[1]


def test_the_target_as_its_own_draft_without_embeddings_is_always_right(
    tiny_llama_pair: Any, plain: Engine, tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[EMBEDDING]

    folder = variant(tiny_llama_pair.target, tmp_path / "draft", change)
    engine = make_engine(tiny_llama_pair, "draft", draft_model=str(folder))
    for params in (GREEDY, SEEDED, PENALTIES):
        assert essence(outputs_of(engine, params=params)) == essence(
            outputs_of(plain, params=params)
        )
    stats = engine.speculation_stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0


def test_a_draft_of_another_family_serves_too(
    tiny_llama_pair: Any, tiny_opt_pair: Any, plain: Engine
) -> None:
    engine = make_engine(tiny_llama_pair, "draft", draft_model=str(tiny_opt_pair.draft))
    assert essence(outputs_of(engine)) == essence(outputs_of(plain))
    assert engine.speculation_stats.num_accepted_tokens > 0


def test_a_draft_with_fewer_positions_drafts_as_far_as_they_go(
    tiny_llama_pair: Any, plain: Engine, tmp_path: Path
) -> None:
    folder = variant(tiny_llama_pair.draft, tmp_path / "draft", max_position_embeddings=40)
    engine = make_engine(tiny_llama_pair, "draft", draft_model=str(folder))
    params = replace(GREEDY, max_tokens=70, ignore_eos=True)
    found = outputs_of(engine, params=params)
    assert essence(found) == essence(outputs_of(plain, params=params))
    assert engine.speculation_stats.num_drafts > 0
    long_prompt = found[4]
    assert long_prompt.num_draft_tokens == 0, "its prompt alone is longer"


# -- the distribution --------------------------------------------------------------------


def sample_many(engine: Engine, params: SamplingParams) -> list[tuple[list[int], int]]:
    """Many unseeded outputs for one prompt, as `surprise` takes them."""
    prompts = [PROMPTS[1]] * 24
    found = outputs_of(engine, prompts, replace(params, n=100))
    return [(o.token_ids, o.num_accepted_tokens) for o in found]


def exact_of(plain: Engine, params: SamplingParams) -> Callable[[tuple[int, ...]], list[float]]:
    """Probabilities of the next token by the log probabilities that the plain engine reports."""
    prompt = list(plain._prepare(PROMPTS[1], GREEDY).request.prompt_token_ids)

    def exact(before: tuple[int, ...]) -> list[float]:
        ask = replace(GREEDY, max_tokens=1, logprobs=params.top_k)
        (output,) = outputs_of(plain, [prompt + list(before)], ask)
        weights = [0.0] * plain.vocab_size
        for token, logprob in output.logprobs[0].top:
            weights[token] = math.exp(logprob / params.temperature)
        total = sum(weights)
        return [weight / total for weight in weights]

    return exact


MANY = {"token_budget": 512, "max_num_seqs": 128, "num_blocks": 1200, "seed": 3}
FEW = SamplingParams(temperature=1.2, top_k=8, max_tokens=4, ignore_eos=True)


def test_unseeded_outputs_follow_the_targets_distribution(
    tiny_llama_pair: Any, plain: Engine
) -> None:
    engine = make_engine(tiny_llama_pair, "draft", **MANY)
    found, exact = sample_many(engine, FEW), exact_of(plain, FEW)
    stats = engine.speculation_stats
    assert 0.1 < stats.num_accepted_tokens / stats.num_draft_tokens < 0.9
    for place in range(4):
        assert surprise(found, place, exact) < 1.0


def test_the_check_of_outputs_finds_a_broken_verification(
    tiny_llama_pair: Any, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        verification,
        "_nums_accepted",
        lambda *args: torch.tensor([len(one.token_ids) for one in args[-1]]),
    )
    engine = make_engine(tiny_llama_pair, "draft", **MANY)
    assert surprise(sample_many(engine, FEW), 1, exact_of(plain, FEW)) > 1.5
