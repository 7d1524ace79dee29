"""With ``deterministic`` an output is the same to the last bit, whatever else there is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from minserve import Engine, SamplingParams
from minserve.errors import ConfigError
from minserve.outputs import RequestOutput

SETTINGS = {
    "threads": 1,
    "num_blocks": 400,
    "block_size": 8,
    "max_num_seqs": 12,
    "deterministic": True,
}
PROMPT_LENGTHS = (1, 3, 8, 61, 64, 66, 130, 200)


def make_engine(folder: Path, dtype: str, **more: Any) -> Engine:
    return Engine(str(folder), dtype=dtype, **{**SETTINGS, "token_budget": 256, **more})


def asked() -> list[tuple[list[int], SamplingParams]]:
    """Prompts and settings of all kinds, with log probabilities, some of the prompt too."""
    rng = random.Random(1)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 5},
        {"seed": 6, "top_p": 0.9, "temperature": 0.7},
        {"seed": 7, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 0.0, "prompt_logprobs": 2},
        {"seed": 8, "min_p": 0.02, "logit_bias": {7: 2.0}},
    ]
    return [
        (
            [rng.randrange(5, 500) for _ in range(length)],
            SamplingParams(max_tokens=14, ignore_eos=True, logprobs=3, **kinds[i % len(kinds)]),
        )
        for i, length in enumerate(PROMPT_LENGTHS)
    ]


def essence(result: RequestOutput) -> tuple[Any, ...]:
    """All numbers of a result, exactly."""
    (output,) = result.outputs
    return output.token_ids, output.logprobs, result.prompt_logprobs


def together(engine: Engine, order: list[int]) -> dict[int, tuple[Any, ...]]:
    requests = [asked()[i] for i in order]
    results = engine.generate(
        [prompt for prompt, _ in requests], [params for _, params in requests]
    )
    return {i: essence(result) for i, result in zip(order, results, strict=True)}


@pytest.fixture(
    scope="module", params=["llama float32", "llama float16", "llama bfloat16", "opt float32"]
)
def model(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A model's folder, and a dtype."""
    family, dtype = request.param.split()
    return request.getfixturevalue(f"tiny_{family}_dir"), dtype


@pytest.fixture(scope="module")
def alone(model: tuple[Path, str]) -> dict[int, tuple[Any, ...]]:
    """Each request by itself, its prompt in one chunk."""
    engine = make_engine(*model, prefix_caching=False)
    return {i: together(engine, [i])[i] for i in range(len(PROMPT_LENGTHS))}


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 13},
        {"token_budget": 37, "block_size": 3, "policy": "fcfs"},
        {"speculator": "ngram", "policy": "sarathi", "max_speculation": 5},
        {"block_size": 128, "num_blocks": 30},
    ],
    ids=str,
)
def test_outputs_are_bit_equal_in_every_company(
    model: tuple[Path, str], alone: dict[int, tuple[Any, ...]], settings: dict[str, Any]
) -> None:
    engine = make_engine(*model, **settings)
    rng = random.Random(str(settings))
    for _ in range(2):
        order = rng.sample(range(len(PROMPT_LENGTHS)), rng.choice([3, 5, 8]))
        found = together(engine, order)
        assert found == {i: alone[i] for i in order}
    # The second time some prompts come from the prefix cache.


def test_preempted_outputs_are_bit_equal(
    model: tuple[Path, str], alone: dict[int, tuple[Any, ...]]
) -> None:
    engine = make_engine(*model, num_blocks=13, policy="sarathi", prefix_caching=False)
    assert together(engine, [0, 1, 2, 3]) == {i: alone[i] for i in range(4)}
    assert engine._core.planner.num_preemptions > 0


@pytest.mark.parametrize(
    "settings",
    [{"device": "cuda"}, {"quantization": "int8"}, {"attention_backend": "triton"},
     {"executor": "simulated", "profile": "opt-6.7b-a100"}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_deterministic_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="deterministic is not available with"):
        Engine("smollm2", deterministic=True, **settings)
