"""What a model reads is compared with its files by their headers, before any weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import NORM, Q_PROJ, weights_of
from safetensors.torch import save_file

from minserve.errors import ModelLoadError
from minserve.models.config import CONFIGS
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.registry import build_model
from minserve.models.tensor_check import check_tensors, require_tensors
from minserve.models.weights.loader import open_checkpoint

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, like: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((like / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_model_wants_the_tensors_that_transformers_has(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    model.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    with open_checkpoint(source) as checkpoint:
        report = require_tensors(checkpoint, load_config(source))
        assert checkpoint.names() == set(report.wanted)
        shapes = {n: tuple(checkpoint.get(n).shape) for n in report.wanted}
    assert report.wanted == shapes
    assert report.unread == []
    assert report.num_parameters == sum(p.numel() for p in model.parameters())


def test_all_that_is_wrong_is_named_at_once(tiny_llama_dir, tmp_path):
    weights = weights_of(tiny_llama_dir)
    weights[Q_PROJ] = weights[Q_PROJ][:8]
    for layer in range(2):
        for name in ("mlp.up_proj", "mlp.down_proj", "input_layernorm"):
            del weights[f"model.layers.{layer}.{name}.weight"]
    weights["model.layers.0.extra.weight"] = torch.zeros(2)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    folder = write_model(tmp_path / "m", tiny_llama_dir, weights)
    source = find_model(str(folder))
    with open_checkpoint(source) as checkpoint:
        report = check_tensors(checkpoint, load_config(source))
        assert len(report.missing) == 6
        assert [one.name for one in report.wrong_shape] == [Q_PROJ]
        assert report.unread == ["model.layers.0.extra.weight"]
        with pytest.raises(ModelLoadError) as error:
            require_tensors(checkpoint, load_config(source))
    text = str(error.value)
    assert str(folder) in text
    assert "6 tensors missing" in text
    assert "and 2 more" in text
    assert f"{Q_PROJ!r} (8, 64), not (64, 64)" in text
    assert "extra" in text


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda w: w.pop("lm_head.weight"), "tie_word_embeddings"),
        (
            lambda w: (w.pop(NORM), w.update({"vision_tower.norm.weight": torch.zeros(2)})),
            "multimodal",
        ),
        (lambda w: w.update({NORM: torch.zeros(8)}), "may be that of another model"),
    ],
)
def test_names_tell_what_kind_of_weights_they_are(tiny_llama_dir, tmp_path, change, hint):
    weights = weights_of(tiny_llama_dir)
    change(weights)
    source = find_model(str(write_model(tmp_path / "m", tiny_llama_dir, weights)))
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(ModelLoadError, match=hint),
    ):
        require_tensors(checkpoint, load_config(source))


def test_a_tensor_of_a_layer_that_nothing_reads_is_refused(tiny_llama_dir, tmp_path, caplog):
    bias = Q_PROJ.replace("weight", "bias")

    def require(**tensors: torch.Tensor) -> None:
        weights = weights_of(tiny_llama_dir) | tensors
        source = find_model(str(write_model(tmp_path / "m", tiny_llama_dir, weights)))
        with open_checkpoint(source) as checkpoint:
            require_tensors(checkpoint, load_config(source))

    with pytest.raises(ModelLoadError, match=f"1 tensor of the model would not be read.*{bias}"):
        require(**{bias: torch.ones(64)})
    with pytest.raises(ModelLoadError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        require(**{"model.layers.2.input_layernorm.weight": torch.ones(64)})  # it has two
    for outside in ("lm_head.bias", "model.norm.bias"):
        with pytest.raises(ModelLoadError, match=rf"would not be read.*{outside}"):
            require(**{outside: torch.ones(64)})
    require(**{bias: torch.zeros(64)})
    for computed in ("rotary_emb.inv_freq", "self_attn.rotary_emb.cos_cached"):
        require(**{f"model.layers.0.{computed}": torch.ones(2)})
    assert not caplog.messages
    require(**{"model.extra": torch.ones(2)})
    assert "'model.extra'" in caplog.text


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_of_two_tied_tensors_the_head_alone_may_be_stored(family, tmp_path):
    from safetensors.torch import save_model
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family, **{**SIZES, "word_embed_proj_dim": 32}, tie_word_embeddings=True
        )
    )
    model.config.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    source = find_model(str(tmp_path))
    placement = WeightPlacement.choose(torch.device("cpu"), "float32")
    with open_checkpoint(source) as checkpoint:
        assert not any("embed_tokens" in name for name in checkpoint.names())
        config = load_config(source)
        require_tensors(checkpoint, config)
        loaded = build_model(checkpoint, config, placement)
    assert torch.equal(loaded.embed.table, model.lm_head.weight)


def test_an_engine_reads_no_weight_of_a_model_that_does_not_fit(
    tiny_llama_dir, tmp_path, monkeypatch
):
    from minserve import Engine
    from minserve.models.weights.loader import SafetensorsCheckpoint

    weights = weights_of(tiny_llama_dir)
    del weights["model.layers.1.mlp.down_proj.weight"]
    folder = write_model(tmp_path / "m", tiny_llama_dir, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama_dir / name).read_bytes())
    read = []

    monkeypatch.setattr(SafetensorsCheckpoint, "_read", lambda *args: read.append(args))
    with pytest.raises(ModelLoadError, match="1 tensor missing"):
        Engine(str(folder))
    assert read == []


def test_the_check_does_not_import_torchs_compiler():
    """It takes seconds, which a start must not have on top."""
    code = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from minserve.models import tensor_check\n"
        "from minserve.models.finding import source\n"
        "from minserve.models.weights import loader\n"
        "class Nothing(loader.Checkpoint):\n"
        "    def _header(self, stored, file): raise AssertionError\n"
        "    def _read(self, stored, file): raise AssertionError\n"
        "found = {}\n"
        "for family, config in source.CONFIGS.items():\n"
        "    values = {**json.loads(sys.argv[1]), 'model_type': family,\n"
        "              'residual_multiplier': 0.5, 'logits_scaling': 8.0}\n"
        "    empty = Nothing(Path(), {}, progress=False)\n"
        "    found[family] = len(tensor_check.check_tensors(empty, config.from_dict(values)).missing)\n"
        "print(json.dumps([found, 'torch._dynamo' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(SIZES)], capture_output=True, text=True, check=True
    )
    missing, imported = json.loads(done.stdout)
    assert missing.keys() == CONFIGS.keys()
    assert min(missing.values()) > 20
    assert not imported
