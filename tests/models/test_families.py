"""Every family in the engine: speculation and replayed prefixes change no token."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minserve import Engine, SamplingParams
from minserve.errors import ConfigError
from minserve.models.config import CONFIGS
from shared.reference_models.reference import choices_along, reference_model, save
from shared.reference_models.variants import ModelVariant

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
    # The model drafts for itself, so drafts are accepted, and a wrong pass would show.
    engine = Engine(
        str(tmp_path), draft_model=str(tmp_path), policy="sarathi", device="cpu", dtype="float32",
        num_blocks=16, block_size=16, max_num_seqs=4, max_model_len=200,
    )  # fmt: skip
    for _ in range(2):
        [output] = engine.generate(PROMPT, params)
        tokens = output.outputs[0].token_ids
        assert len(tokens) == NUM_TOKENS
        assert tokens == choices_along(model, PROMPT, tokens)


def test_rope_scaling_allows_longer_sequences_where_they_are_asked_for(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    settings = {"vocab_size": VOCAB, "max_position_embeddings": 64, "rope_parameters": rope}
    case = ModelVariant("dynamic", "llama", settings)
    save(reference_model(case), tmp_path, case)
    for file in tiny_llama_dir.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)

    def longest_output(**settings: int) -> int:
        engine = Engine(str(tmp_path), policy="sarathi", device="cpu", num_blocks=32, **settings)
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        [output] = engine.generate(PROMPT[:50], params)
        return 50 + len(output.outputs[0].token_ids)

    assert longest_output() == 64
    assert longest_output(max_model_len=256) == 256
    with pytest.raises(ConfigError, match="this model allows at most 256 tokens"):
        longest_output(max_model_len=257)
