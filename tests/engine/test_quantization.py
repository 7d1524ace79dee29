"""Engines on int8 weights: close to the plain model, refused where they cannot run, told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minserve import Engine, SamplingParams
from minserve.config import EngineConfig
from minserve.engine.profile.profile_cache import profile_key
from minserve.errors import ConfigError

SETTINGS = {"device": "cpu", "dtype": "float32", "threads": 1, "num_blocks": 100}
PROMPTS = [list(range(5, 5 + n)) for n in (1, 7, 40)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(params=["llama", "opt"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


@torch.inference_mode()
def reference_logprobs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """By transformers in float32, of each token but the first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    return rows[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def test_log_probabilities_are_near_those_of_transformers(folder: Path) -> None:
    engine = Engine(str(folder), quantization="int8", **SETTINGS)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = engine.generate([PROMPTS[-1]], params)
    got = torch.tensor([one.logprob for one in output.prompt_logprobs[1:]])
    want = reference_logprobs(folder, PROMPTS[-1])
    error = (got - want).abs()
    # Quantized at all, and well; CPUs without VNNI have a coarser grid.
    assert 0 < error.mean() < 0.15
    assert error.max() < 0.5


def test_greedy_outputs_are_the_same_in_every_run(folder: Path) -> None:
    def outputs() -> list[tuple[int, ...]]:
        engine = Engine(str(folder), quantization="int8", **SETTINGS)
        return [tuple(out.outputs[0].token_ids) for out in engine.generate(PROMPTS, GREEDY)]

    first = outputs()
    assert [len(tokens) for tokens in first] == [12, 12, 12]
    assert outputs() == first


def test_a_draft_model_speculates_on_int8_weights(tiny_llama_dir: Path) -> None:
    engine = Engine(
        str(tiny_llama_dir), draft_model=str(tiny_llama_dir), quantization="int8", policy="fcfs",
        **SETTINGS,
    )  # fmt: skip
    (output,) = engine.generate([PROMPTS[1]], GREEDY)
    assert output.outputs[0].num_accepted_tokens > 0


def test_profiles_of_quantized_weights_are_kept_apart(tiny_llama_dir: Path) -> None:
    def key(**more: str) -> object:
        return profile_key(Engine(str(tiny_llama_dir), **SETTINGS | more)._core, "model")

    assert key().dtype == "float32"
    assert key(quantization="int8").dtype == "int8 in float32"
    assert key(quantization="int8", dtype="bfloat16").dtype == "int8 in bfloat16"


def test_unknown_quantizations_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization must be one of none, int8, not 'int3'"):
        EngineConfig(quantization="int3")


def test_a_simulated_device_has_nothing_to_quantize() -> None:
    with pytest.raises(ConfigError, match="leave quantization out"):
        EngineConfig(executor="simulated", profile="opt-6.7b-a100", quantization="int8")
