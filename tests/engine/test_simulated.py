"""An engine whose device is only a clock: what it gives, what it refuses, how long it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minserve import Engine, SamplingParams
from minserve.devices import find_device
from minserve.engine import simulated
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ConfigError, GenerationError, InvalidRequestError, WorkloadError
from minserve.models.finding.source import find_model
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.structure import Structure

PUBLISHED = "opt-6.7b-a100"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the speed of a device that is fast enough for tests."""
    path = tmp_path_factory.mktemp("profiles") / "fast.json"
    model = PerfModel([Piece(tokens=1e-6, base=1e-5)])
    path.write_text(json.dumps({"key": {"model": "fast"}, "model": model.to_dict()}))
    return str(path)


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path, profile: str) -> Engine:
    return Engine(str(tiny_llama_dir), executor="simulated", profile=profile, num_blocks=200)


def tokens(engine: Engine, params: SamplingParams, num_prompts: int = 1) -> list[list[int]]:
    prompts = [list(range(5, 9 + i)) for i in range(num_prompts)]
    return [one.token_ids for r in engine.generate(prompts, params) for one in r.outputs]


def test_it_generates_as_many_tokens_as_asked_for_and_their_text(
    engine: Engine, tiny_llama_dir: Path
) -> None:
    params = SamplingParams(max_tokens=33, n=2, seed=1, ignore_eos=True)
    (result,) = engine.generate("The quick brown fox", params)
    tokenizer = Tokenizer.load(find_model(str(tiny_llama_dir)))
    for output in result.outputs:
        assert len(output.token_ids) == 33
        assert max(output.token_ids) < tokenizer.vocab_size
        assert output.finish_reason == "length"
        assert output.text == tokenizer.decode(output.token_ids)
    assert result.outputs[0].token_ids != result.outputs[1].token_ids


def test_a_seed_decides_the_tokens_whatever_else_runs(engine: Engine) -> None:
    params = [SamplingParams(max_tokens=40, seed=seed, ignore_eos=True) for seed in (3, 4, -3)]
    alone = [tokens(engine, one)[0] for one in params]
    assert len({tuple(one) for one in alone}) == 3
    together = engine.generate([[7] * 50, [8], [9] * 7], params)
    assert [one.outputs[0].token_ids for one in together] == alone


def test_no_output_ends_of_its_own_before_its_length(engine: Engine) -> None:
    params = SamplingParams(max_tokens=300, n=8, seed=1)
    outputs = tokens(engine, params)
    assert [len(output) for output in outputs] == [300] * 8
    made = {token for output in outputs for token in output}
    assert len(made) > 10
    assert not made & engine.tokenizer.eos_token_ids
    assert outputs == tokens(engine, replace(params, ignore_eos=True))


def test_a_token_that_the_request_stops_at_ends_it(engine: Engine) -> None:
    (whole,) = tokens(engine, SamplingParams(max_tokens=20, seed=2))
    params = SamplingParams(max_tokens=20, seed=2, stop_token_ids=[whole[9]])
    (output,) = engine.generate([[5, 6, 7]], params)[0].outputs
    assert output.token_ids == whole[: whole.index(whole[9]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", whole[9])


def test_a_text_that_comes_back_is_found_in_the_prefix_cache(engine: Engine) -> None:
    prompt = "The quick brown fox"
    params = SamplingParams(max_tokens=100, seed=4)
    (first,) = engine.generate(prompt, params)
    (second,) = engine.generate(prompt + first.outputs[0].text + " and", params)
    known = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    assert list(second.prompt_token_ids[: len(known)]) == known
    block = engine.config.block_size
    # The KV of the last token was never computed.
    assert second.num_cached_tokens == (len(known) - 1) // block * block


def test_an_executor_needs_a_profile_and_a_profile_an_executor(tiny_llama_dir: Path) -> None:
    for settings in (
        {"executor": "simulated"},
        {"profile": PUBLISHED},
        {"executor": "model", "profile": PUBLISHED},
    ):
        with pytest.raises(ConfigError, match="give both or none"):
            Engine(str(tiny_llama_dir), **settings)
    with pytest.raises(ConfigError, match="executor must be one of model, simulated"):
        Engine(str(tiny_llama_dir), executor="dreamed")


def test_an_unknown_profile_is_refused_by_name(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"'no-such-device' is neither .* opt-6\.7b-a100"):
        Engine(str(tiny_llama_dir), executor="simulated", profile="no-such-device")
    spoilt = tmp_path / "spoilt.json"
    spoilt.write_text("{}")
    with pytest.raises(WorkloadError, match=r"spoilt\.json is not a profile"):
        Engine(str(tiny_llama_dir), executor="simulated", profile=str(spoilt))


@pytest.mark.parametrize("how", [{"speculator": "ngram"}, {"draft": True}], ids=["ngram", "draft"])
def test_a_speculator_is_refused(tiny_llama_dir: Path, how: dict) -> None:
    settings = {"draft_model": str(tiny_llama_dir)} if "draft" in how else how
    with pytest.raises(ConfigError, match="drafts nothing"):
        Engine(str(tiny_llama_dir), executor="simulated", profile=PUBLISHED, **settings)


@pytest.mark.parametrize("what", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_fail_their_request_alone(engine: Engine, what: str) -> None:
    params = SamplingParams(max_tokens=10, seed=1, ignore_eos=True)
    expected = tokens(engine, params)
    other = engine.stream([5, 6, 7, 8], params)
    first = next(other)
    with pytest.raises(GenerationError, match="no log probabilities"):
        engine.generate("The quick", SamplingParams(max_tokens=10, **{what: 0}))
    assert [*first.token_ids, *(t for delta in other for t in delta.token_ids)] == expected[0]
    assert tokens(engine, params) == expected
    assert engine._core.pool.num_free_blocks == engine._core.pool.num_blocks


class Clock:
    """Stands for `time`: only sleeping takes any."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_structure_is_refused_where_words_are_made_up(engine: Engine) -> None:
    params = SamplingParams(structure=Structure.of_json(param="response_format"))
    with pytest.raises(InvalidRequestError, match="makes its words up") as caught:
        engine.generate("x", params)
    assert caught.value.param == "response_format"


def test_an_iteration_takes_as_long_as_on_the_device(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(simulated, "time", clock)
    engine = Engine(str(tiny_llama_dir), executor="simulated", profile=PUBLISHED)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    # The weights are read once for each token; by the published coefficients that takes so long.
    started = clock.now
    engine.generate([[5, 6, 7]], params)
    assert clock.now - started == pytest.approx(8 * 0.02480 + (3 + 7) * 6.878e-5)
    # Prompts of 4000 tokens together take the time of the steeper piece.
    started = clock.now
    engine.generate([[10 + i] * 1000 for i in range(4)], SamplingParams(max_tokens=1))
    assert clock.now - started == pytest.approx(4000 * 7.523e-5 + 0.003033)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"max_model_len": 4096}, "beyond the 2048 tokens"), ({"max_num_seqs": 9000}, "token_budget")],
    ids=["length", "sequences"],
)
def test_what_a_device_cannot_hold_is_refused(
    tiny_llama_dir: Path, settings: dict, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Engine(str(tiny_llama_dir), executor="simulated", profile=PUBLISHED, **settings)


def test_its_speed_is_known_without_measuring(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), executor="simulated", profile=PUBLISHED)
    assert engine.perf_model.pieces == find_device(PUBLISHED).pieces
    assert engine._core.snapshot().profile_completeness == 1.0
    assert engine.max_model_len == 2048


def test_a_profile_without_kv_memory_needs_a_number_of_blocks(
    tiny_llama_dir: Path, profile: str
) -> None:
    with pytest.raises(ConfigError, match="give --num-blocks"):
        Engine(str(tiny_llama_dir), executor="simulated", profile=profile)
    settings = {"executor": "simulated", "profile": profile, "num_blocks": 4, "block_size": 8}
    engine = Engine(str(tiny_llama_dir), **settings)
    assert engine.max_model_len == 32
    assert len(tokens(engine, SamplingParams(max_tokens=28, ignore_eos=True))[0]) == 28


def test_the_iterations_of_a_gpu_overlap_and_give_the_same_tokens(
    engine: Engine, tiny_llama_dir: Path, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(find_device(profile), is_gpu=True)
    monkeypatch.setattr(simulated, "find_device", lambda _: gpu)
    other = Engine(str(tiny_llama_dir), executor="simulated", profile=profile, num_blocks=200)
    params = SamplingParams(max_tokens=30, n=3, seed=5, ignore_eos=True)
    assert tokens(other, params, 4) == tokens(engine, params, 4)
    assert other._core.stats.plans_ahead["launched"] > 20
    assert not any(engine._core.stats.plans_ahead.values())
    assert find_device(PUBLISHED).is_gpu


def test_a_batch_behind_another_one_begins_when_that_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulated.time, "monotonic", lambda: 100.0)
    runner = simulated.SimulatedRunner(PerfModel([Piece(tokens=1e-3, base=2.0)]), [1])
    first = runner.launch([])
    assert first._ends_at == 102.0
    assert runner.follow([], first)._ends_at == 104.0
    monkeypatch.setattr(simulated.time, "monotonic", lambda: 110.0)
    assert runner.launch([])._ends_at == 112.0
