"""A model's generation_config.json: what of it counts, and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minserve import Engine, SamplingParams
from minserve.config import EngineConfig
from minserve.engine.model_tokenizer import load_model_tokenizer
from minserve.engine.sampling_defaults import default_params, load_sampling_defaults
from minserve.errors import ModelLoadError
from minserve.models.finding.source import find_model

SETTINGS = {"dtype": "float32", "device": "cpu", "threads": 1, "num_blocks": 64, "block_size": 16}
PROMPT = "The quick brown fox"


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "tiny"))


def write(folder: Path, **values: Any) -> str:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return str(folder)


def load(folder: Path, setting: str = "auto", **values: Any) -> dict[str, Any]:
    config = EngineConfig.create(write(folder, **values), generation_config=setting)
    return load_sampling_defaults(config, find_model(config.model))


def test_the_models_settings_count_under_the_apis_names(model):
    values = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_new_tokens": 100,
    }
    others = {"do_sample": False, "eos_token_id": [1, 2], "num_beams": 4, "top_h": None}
    renamed = {k: v for k, v in values.items() if k != "max_new_tokens"} | {"max_tokens": 100}
    assert load(model, **values, **others) == renamed
    assert load(model, "off", **values, **others) == {}


def test_a_value_without_sense_is_named_and_left_out(model, caplog):
    values = {"temperature": "warm", "top_p": 1.5, "top_k": 2.5, "min_p": 0.1, "max_new_tokens": 0}
    assert load(model, **values) == {"min_p": 0.1}
    assert len(caplog.messages) == 4
    for name in ("temperature", "top_p", "top_k", "max_new_tokens"):
        (line,) = [one for one in caplog.messages if f": {name} is left out" in one]
        assert "generation_config.json" in line


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_that_cannot_be_read_is_an_error_unless_it_is_left_out(model, text):
    (model / "generation_config.json").write_text(text)
    config = EngineConfig.create(str(model))
    for load in (load_sampling_defaults, load_model_tokenizer):
        with pytest.raises(ModelLoadError, match="or start with --generation-config off"):
            load(config, find_model(config.model))
    engine = Engine(str(model), generation_config="off", **SETTINGS)
    assert engine.sampling_defaults == {}
    assert engine.tokenizer.eos_token_ids == {2}


def test_stop_tokens_of_a_file_that_is_left_out_do_not_count(model):
    source = find_model(write(model, eos_token_id=[2, 5]))
    found = [
        load_model_tokenizer(EngineConfig.create(str(model), generation_config=setting), source)
        for setting in ("auto", "off")
    ]
    assert [one.eos_token_ids for one in found] == [{2, 5}, {2}]


def test_the_embedded_model_has_none():
    assert load_sampling_defaults(EngineConfig.create(), find_model("smollm2")) == {}


def test_a_request_without_params_takes_them():
    assert default_params({}) == SamplingParams()
    wanted = SamplingParams(temperature=0.0, max_tokens=None)
    assert default_params({"temperature": 0.0, "max_tokens": 7}) == wanted


def test_an_engine_uses_them_only_where_no_params_are_given(model):
    engine = Engine(write(model, temperature=0.0, max_new_tokens=9), **SETTINGS)
    assert engine.default_sampling_params == SamplingParams(temperature=0.0, max_tokens=None)
    outputs = [engine.generate(PROMPT)[0].outputs[0].token_ids for _ in range(2)]
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    longer = engine.generate(PROMPT, greedy)[0].outputs[0].token_ids
    assert outputs == [longer[:9]] * 2
    sampled = SamplingParams(seed=1, max_tokens=20)
    assert engine.generate(PROMPT, sampled)[0].outputs[0].token_ids[:9] != longer[:9]
    streamed = [i for delta in engine.stream(PROMPT) for i in delta.token_ids]
    assert streamed == outputs[0]


def test_the_models_limit_never_refuses_a_request(model):
    limit = 10_000  # more than the model's length
    engine = Engine(
        write(model, temperature=0.0, max_new_tokens=limit), max_model_len=64, **SETTINGS
    )
    prompt = list(range(40))
    assert len(engine.generate([prompt])[0].outputs[0].token_ids) <= 24
    engine = Engine(write(model, max_new_tokens=2), max_model_len=64, **SETTINGS)
    at_least = SamplingParams(max_tokens=None, min_tokens=5, ignore_eos=True)
    assert len(engine.generate([prompt], at_least)[0].outputs[0].token_ids) == 5
