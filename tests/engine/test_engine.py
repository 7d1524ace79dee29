"""The blocking engine on real model files, against transformers and against itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from minserve import Engine, SamplingParams
from minserve.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    ModelLoadError,
    RequestTooLongError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=24, ignore_eos=True, seed=7)
SETTINGS = {"dtype": "float32", "threads": 1, "token_budget": 256, "max_num_seqs": 16, "num_blocks": 200,
            "block_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(str(tiny_llama_dir), **SETTINGS)


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def prompts(count: int = 6, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(5, 500) for _ in range(rng.choice([1, 5, 9, 40, 77]))] for _ in range(count)
    ]


def tokens(engine: Engine, prompt_list: list[list[int]], params: SamplingParams) -> list[list[int]]:
    outputs = engine.generate(prompt_list, params)
    assert engine._core.num_unfinished == 0
    return [o.token_ids for r in outputs for o in r.outputs]


@torch.inference_mode()
def reference_logprobs(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def test_greedy_output_is_that_of_transformers(engine: Engine, reference: torch.nn.Module) -> None:
    for prompt, got in zip(prompts(), tokens(engine, prompts(), GREEDY), strict=True):
        logprobs = reference_logprobs(reference, prompt + got)
        assert got == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 16},
        {"token_budget": 17, "prefix_caching": False},
        {"policy": "fcfs"},
        {"policy": "fcfs", "chunked_prefill": False},
        {"num_blocks": 14, "block_size": 8},
        {"block_size": 1, "num_blocks": 110},
        {"max_num_seqs": 1},
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()),
)  # fmt: skip
def test_output_does_not_depend_on_how_it_is_scheduled(
    engine: Engine, tiny_llama_dir: Path, settings: dict, params: SamplingParams
) -> None:
    expected = [tokens(engine, [p], params)[0] for p in prompts()]
    other = Engine(str(tiny_llama_dir), **SETTINGS | settings)
    assert tokens(other, prompts(), params) == expected
    if settings.get("num_blocks") == 14:
        assert other._core.planner.num_preemptions > 0
    # Once more, now with whatever prefixes the cache holds.
    assert tokens(other, prompts(), params) == expected
    # A small pool has forgotten the prompts, and what a preempted one finds of itself is no hit.
    if settings.get("prefix_caching", True) and "num_blocks" not in settings:
        assert other._core.pool.prefix_hits_tokens > 0


def test_opt_runs_too(tiny_opt_dir: Path) -> None:
    from transformers import OPTForCausalLM

    engine = Engine(str(tiny_opt_dir), **SETTINGS)
    model = OPTForCausalLM.from_pretrained(tiny_opt_dir, dtype=torch.float32).eval()
    for prompt, got in zip(prompts(), tokens(engine, prompts(), GREEDY), strict=True):
        logprobs = reference_logprobs(model, prompt + got)
        assert got == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_logprobs_are_those_of_transformers(engine: Engine, reference: torch.nn.Module) -> None:
    params = SamplingParams(
        temperature=0.8, seed=1, max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    prompt = prompts()[3]
    (result,) = engine.generate([prompt], params)
    output = result.outputs[0]
    expected = reference_logprobs(reference, prompt + output.token_ids)
    rows = [*result.prompt_logprobs[1:], *output.logprobs]
    assert result.prompt_logprobs[0] is None
    assert len(rows) == len(prompt) + 7
    for position, row in enumerate(rows):
        assert row.token_id == (prompt + output.token_ids)[position + 1]
        assert row.logprob == pytest.approx(expected[position, row.token_id].item(), abs=1e-4)
        best = expected[position].topk(len(row.top))
        assert [t for t, _ in row.top] == best.indices.tolist()
        assert [v for _, v in row.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert row.rank == 1 + (expected[position] > expected[position, row.token_id]).sum().item()


def test_prompt_logprobs_survive_chunks_preemption_and_a_warm_cache(
    tiny_llama_dir: Path, engine: Engine
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, prompt_logprobs=0, ignore_eos=True)
    expected = [engine.generate([p], params)[0].prompt_logprobs for p in prompts()]
    small = Engine(str(tiny_llama_dir), **SETTINGS | {"num_blocks": 14, "token_budget": 16})
    for _ in range(2):
        for want, got in zip(expected, small.generate(prompts(), params), strict=True):
            assert [x and x.token_id for x in got.prompt_logprobs] == [
                x and x.token_id for x in want
            ]
            values = [x.logprob for x in got.prompt_logprobs[1:]]
            assert values == pytest.approx([x.logprob for x in want[1:]], abs=1e-4)


def test_n_outputs_differ_and_are_reproducible(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, n=4, seed=11, max_tokens=12, ignore_eos=True)
    first, second = (engine.generate("Hello there", params)[0] for _ in range(2))
    texts = [o.text for o in first.outputs]
    assert len(set(texts)) == 4
    assert texts == [o.text for o in second.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]


def test_unseeded_requests_differ_and_the_engine_seed_repeats_them(tiny_llama_dir: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    runs = []
    for _ in range(2):
        engine = Engine(str(tiny_llama_dir), **SETTINGS, seed=5)
        runs.append([engine.generate("Hi", params)[0].outputs[0].token_ids for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_stop_string_ends_the_output_before_it(engine: Engine) -> None:
    free = engine.generate("The quick", GREEDY)[0].outputs[0]
    stop = free.text[5:9]
    (result,) = engine.generate(
        "The quick", SamplingParams(temperature=0.0, max_tokens=24, stop=stop, ignore_eos=True)
    )
    output = result.outputs[0]
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == free.token_ids[: len(output.token_ids)]


def test_stop_token_and_min_tokens(engine: Engine) -> None:
    free = engine.generate("The quick", GREEDY)[0].outputs[0]
    token = free.token_ids[3]
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[token], ignore_eos=True)
    output = engine.generate("The quick", params)[0].outputs[0]
    assert output.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    params = SamplingParams(
        temperature=0.0, max_tokens=24, min_tokens=10, stop_token_ids=[token], ignore_eos=True
    )
    longer = engine.generate("The quick", params)[0].outputs[0]
    assert len(longer.token_ids) > 10
    assert token not in longer.token_ids[:10]


def test_max_tokens_ends_with_length_and_counts_exactly(engine: Engine) -> None:
    output = engine.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0]
    assert len(output.token_ids) == 3
    assert output.finish_reason == "length"


def test_no_max_tokens_runs_to_the_models_length(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS, max_model_len=40)
    output = engine.generate([[7] * 30], SamplingParams(max_tokens=None, ignore_eos=True))[
        0
    ].outputs[0]
    assert len(output.token_ids) == 10


def test_a_repeated_prompt_hits_the_prefix_cache(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS)
    prompt = list(range(10, 60))
    assert engine.generate([prompt], GREEDY)[0].num_cached_tokens == 0
    assert engine.generate([prompt], GREEDY)[0].num_cached_tokens == 48


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5] * 600, GREEDY, "512"),
        ([5] * 500, SamplingParams(max_tokens=100), "length is 512 tokens.*600 tokens"),
        ([5, 512], GREEDY, "outside the vocabulary"),
        ("", GREEDY, "empty"),
        ([5], SamplingParams(stop_token_ids=[10**6]), "outside the vocabulary"),
        ([5], SamplingParams(allowed_token_ids=[512]), "allowed_token_ids: 512 is outside"),
        ([5], SamplingParams(logit_bias={512: 1.0}), "logit_bias: 512 is outside"),
        ([5], SamplingParams(allowed_token_ids=[9], stop_token_ids=[9], min_tokens=1), "no token"),
        ([5], SamplingParams(stop_token_ids=list(range(512)), min_tokens=1), "no token"),
        ([5] * 509, SamplingParams(max_tokens=None, min_tokens=10), "min_tokens"),
    ],
    ids=[
        "long prompt",
        "long output",
        "bad token",
        "empty",
        "bad stop id",
        "bad allowed id",
        "bad bias",
        "nothing allowed",
        "nothing but ends",
        "min_tokens",
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    engine: Engine, prompt: object, params: SamplingParams, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engine.stream(prompt, params)
    assert engine._core.num_unfinished == 0


def test_a_request_beyond_the_whole_pool_is_refused(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), **SETTINGS | {"num_blocks": 4})
    with pytest.raises(RequestTooLongError, match="length is 32 tokens"):
        engine.generate([[5] * 20], SamplingParams(max_tokens=20))
    assert (
        len(
            engine.generate([[5] * 20], SamplingParams(max_tokens=12, ignore_eos=True))[0]
            .outputs[0]
            .token_ids
        )
        == 12
    )


def test_one_failing_request_does_not_touch_its_neighbours(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = 3
    expected = tokens(engine, prompts(3), GREEDY)
    assert poison not in {t for p in prompts(3) + expected for t in p}
    forward = engine._core.runner.model.forward

    def failing(token_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        if (token_ids == poison).any():
            raise RuntimeError("device fell over")
        return forward(token_ids, *rest)

    monkeypatch.setattr(engine._core.runner.model, "forward", failing)
    bad = engine.stream([poison, 8, 9], GREEDY)
    good = [engine.stream(p, GREEDY) for p in prompts(3)]
    firsts = [next(g) for g in good]
    with pytest.raises(GenerationError, match="device fell over"):
        next(bad)
    got = [
        [*first.token_ids, *(t for d in g for t in d.token_ids)]
        for first, g in zip(firsts, good, strict=True)
    ]
    assert got == expected
    engine._core.pool.check_integrity([])


def test_interleaved_streams_lose_nothing_and_closing_one_frees_it(engine: Engine) -> None:
    expected = tokens(engine, prompts(2), GREEDY)
    free = engine._core.pool.num_free_blocks
    left, right, dropped = (engine.stream(p, GREEDY) for p in [*prompts(2), [9] * 50])
    next(dropped)
    collected: list[list[int]] = [[], []]
    for a, b in zip(left, right, strict=True):
        collected[0] += a.token_ids
        collected[1] += b.token_ids
        dropped.close()
    assert collected == expected
    assert engine._core.pool.num_free_blocks == free


def test_settings_are_checked(tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'blocksize'"):
        Engine(str(tiny_llama_dir), blocksize=3)
    with pytest.raises(ConfigError, match="this model allows at most 512 tokens"):
        Engine(str(tiny_llama_dir), max_model_len=1000)
    with pytest.raises(ConfigError, match="does not fit the KV cache of 32 tokens"):
        Engine(str(tiny_llama_dir), max_model_len=100, num_blocks=1)
    with pytest.raises(ConfigError, match="token_budget"):
        Engine(str(tiny_llama_dir), token_budget=4, max_num_seqs=8)
    with pytest.raises(ModelLoadError):
        Engine(str(tiny_llama_dir / "nothing"))


def test_a_cpu_runs_512_tokens_at_a_time_unless_told(tiny_llama_dir: Path) -> None:
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "num_blocks": 4}
    assert Engine(str(tiny_llama_dir), **settings)._core.token_budget == 512
    with pytest.raises(ConfigError, match=r"token_budget \(512\) must be at least max_num_seqs"):
        Engine(str(tiny_llama_dir), max_num_seqs=600, **settings)


def test_float16_on_a_cpu_rounds_only_the_weights(tiny_llama_dir: Path, engine: Engine) -> None:
    half = Engine(str(tiny_llama_dir), **SETTINGS | {"dtype": "float16"})
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompt = prompts()[3]
    exact, rounded = (e.generate([prompt], params)[0].prompt_logprobs[1:] for e in (engine, half))
    assert [x.logprob for x in rounded] == pytest.approx([x.logprob for x in exact], abs=0.03)
    assert [x.logprob for x in rounded] != [x.logprob for x in exact]
