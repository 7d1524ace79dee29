"""The example that trains a target and its draft: real training, a few seconds per family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from example_scripts import load_example

from minserve import Engine, SamplingParams

PROMPTS = ["def read(self, path):\n    ", "import os\nimport sys\n\n", "class Error(Exception):"]
NEW_TOKENS = 32


example = load_example("train_tiny_pair")


@pytest.fixture(scope="module", params=example.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(family: str, request: pytest.FixtureRequest):
    return request.getfixturevalue(f"tiny_{family}_pair")


def test_the_draft_agrees_often_but_not_always(pair) -> None:
    # What comes out depends on the Python release and the processor too.
    assert 0.1 < pair.agreement < 0.99
    assert pair.target_loss < pair.draft_loss


@pytest.mark.parametrize("role", ["target", "draft"])
def test_both_load_and_write_what_transformers_writes(pair, role: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder = getattr(pair, role)
    engine = Engine(str(model_folder), device="cpu", dtype="float32", threads=1, num_blocks=64)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    results = engine.generate(PROMPTS, params)

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        expected = written[0, ids["input_ids"].shape[1] :].tolist()
        got = list(result.outputs[0].token_ids)
        assert got == expected[: len(got)]
        assert expected[len(got) :] in ([], [tokenizer.eos_token_id])


def test_target_and_draft_share_one_vocabulary(pair) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folders = (pair.target, pair.draft)
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in folders]
    configs = [AutoConfig.from_pretrained(f) for f in folders]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    for tokenizer, config in zip(tokenizers, configs, strict=True):
        assert config.vocab_size == len(tokenizer) == example.SMALL.vocab_size
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
        assert tokenizer.eos_token_id == config.eos_token_id


def test_the_same_recipe_again_reuses_the_files(pair, family: str) -> None:
    folder = pair.target.parent

    def written() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}

    before = written()
    assert example.train_pair(folder, family, example.SMALL, progress=False) == pair
    assert written() == before


def test_held_out_files_are_not_trained_on() -> None:
    train, held_out = example.read_texts(example.SMALL)
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert example.read_texts(example.SMALL) == (train, held_out)


def test_what_cannot_be_trained_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown family 'gpt'"):
        example.train_pair(tmp_path, "gpt", example.SMALL)
    with pytest.raises(ValueError, match="max_positions"):
        example.train_pair(tmp_path, "opt", replace(example.SMALL, max_positions=128))
    with pytest.raises(ValueError, match="the text gives"):
        example.train_pair(tmp_path, "opt", replace(example.SMALL, megabytes=0))
    assert not list(tmp_path.iterdir())
