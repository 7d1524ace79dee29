"""Every family in the engine: speculation and replayed prefixes change no token."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from parts.parity.reference import reference_greedy, reference_model, save
from parts.parity.variants import ModelVariant

from minserve import Engine, SamplingParams
from minserve.models.config import CONFIGS

# As many as the tokenizer of the tiny models may need.
VOCAB = 512
PROMPT = list(range(5, 40)) * 2
NUM_TOKENS = 24


@pytest.mark.parametrize("family", CONFIGS)
def test_drafts_and_cached_prefixes_change_no_token(
    family: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    case = ModelVariant(family, family, {"vocab_size": VOCAB})
    model = reference_model(case)
    save(model, tmp_path, case)
    for file in tiny_llama_dir.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    want = reference_greedy(model, PROMPT, NUM_TOKENS)
    # The model drafts for itself, so drafts are accepted, and a wrong pass would show.
    engine = Engine(
        str(tmp_path), draft_model=str(tmp_path), policy="sarathi", device="cpu", dtype="float32",
        num_blocks=16, block_size=16, max_num_seqs=4, max_model_len=200,
    )  # fmt: skip
    for _ in range(2):
        [output] = engine.generate(PROMPT, params)
        assert output.outputs[0].token_ids == want
