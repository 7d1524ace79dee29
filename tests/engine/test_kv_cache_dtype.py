"""Engines with a KV cache in 8 bits: near the exact one, the same in any company, told apart."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from speculating import GREEDY, PROMPTS, SETTINGS, essence, make_engine, outputs_of

from minserve import Engine
from minserve.config import EngineConfig
from minserve.engine.build import load_engine
from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.inspection import inspect_model
from minserve.engine.profile.profile_cache import profile_key
from minserve.errors import ConfigError

FORMS = pytest.mark.parametrize("form", ["int8", "fp8"])
TEXT = "The capital of France is Paris. The capital of Italy is Rome, and that of Spain is Madrid."


def distributions(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """Log probabilities ``[tokens, vocabulary]`` after each token, from a cache that was written
    in two chunks.
    """
    runner, half = engine._core.runner, len(token_ids) // 2
    blocks = list(range(-(-len(token_ids) // runner.block_size)))
    first = runner.forward([Chunk(token_ids[:half], 0, blocks)], 0)
    second = runner.forward([Chunk(token_ids[half:], half, blocks)], 0)
    with torch.inference_mode():
        return runner.model.logits(torch.cat((first, second))).log_softmax(-1)


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.004), ("fp8", 0.02)])
def test_the_next_tokens_are_near_those_of_the_exact_cache(form: str, bound: float) -> None:
    settings = {"dtype": "float32", "threads": 1, "num_blocks": 8}
    exact, engine = (
        Engine("smollm2", **settings),
        Engine("smollm2", kv_cache_dtype=form, **settings),
    )
    token_ids = exact.tokenizer.encode(TEXT)
    want, got = distributions(exact, token_ids), distributions(engine, token_ids)
    divergence = (want.exp() * (want - got)).sum(-1).mean()
    assert 0 < divergence < bound


@pytest.mark.parametrize(("family", "form"), [("llama", "int8"), ("opt", "fp8")])
def test_prefix_hits_preemption_and_speculation_change_no_output(
    request: pytest.FixtureRequest, family: str, form: str
) -> None:
    pair = request.getfixturevalue(f"tiny_{family}_pair")
    engine = make_engine(pair, kv_cache_dtype=form)
    want = essence(outputs_of(engine))
    assert essence(outputs_of(engine)) == want
    assert engine._core.pool.prefix_hits_tokens > 0
    tight = make_engine(pair, kv_cache_dtype=form, token_budget=20, num_blocks=11)
    assert essence(outputs_of(tight)) == want
    drafting = make_engine(pair, "draft", kv_cache_dtype=form)
    assert drafting._core.proposer.model.kv[0].key.dtype is engine._core.runner.kv[0].key.dtype
    drafted = outputs_of(drafting)
    assert essence(drafted) == want
    assert sum(output.num_accepted_tokens for output in drafted) > 0


def test_kernels_of_a_gpu_give_the_outputs_of_plain_torch(tiny_llama_pair: Any) -> None:
    def outputs(backend: str, **more: Any) -> list[tuple]:
        engine = make_engine(
            tiny_llama_pair, kv_cache_dtype="int8", attention_backend=backend, **more
        )
        return essence(outputs_of(engine, PROMPTS[:2], GREEDY))

    assert outputs("triton", num_blocks=20) == outputs("torch", num_blocks=20)


@FORMS
def test_what_is_said_of_its_memory_is_true(tiny_llama_dir: Path, form: str) -> None:
    config = EngineConfig.create(str(tiny_llama_dir), **SETTINGS, kv_cache_dtype=form)
    said = inspect_model(config).facts["memory"]["kv_per_token"]
    kv = Engine(str(tiny_llama_dir), **SETTINGS, kv_cache_dtype=form)._core.runner.kv
    tokens = SETTINGS["num_blocks"] * SETTINGS["block_size"]
    assert said == sum(part.nbytes for layer in kv for part in layer.parts) / tokens


def test_profiles_and_the_log_tell_it(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def key(form: str) -> str:
        config = EngineConfig.create(str(tiny_llama_dir), **SETTINGS, kv_cache_dtype=form)
        return profile_key(load_engine(config).core, "model").dtype

    assert key("auto") == "float32"
    assert "300 KV blocks of 8 tokens, ready" in caplog.text
    assert key("int8") == "float32, KV in int8"
    assert "300 KV blocks of 8 tokens in int8, ready" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention_backend": "flash-attn", "block_size": 256}, "use --attention-backend triton"),
        ({"executor": "simulated", "profile": "opt-6.7b-a100"}, "leave kv_cache_dtype out"),
        ({"deterministic": True}, "deterministic is not available with kv_cache_dtype 'int8'"),
    ],
)
def test_what_reads_no_8_bits_refuses_them(settings: dict[str, Any], words: str) -> None:
    EngineConfig(**settings)
    with pytest.raises(ConfigError, match=words):
        EngineConfig(kv_cache_dtype="int8", **settings)


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, fp8, int8"):
        EngineConfig(kv_cache_dtype="int4")
