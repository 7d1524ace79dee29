"""Where models come from: every place and form that is read, and what is said of all others."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import as_bin, assert_reads_all, weights_of, write_gguf, write_json
from safetensors.torch import save_file

from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.source import find_model, fingerprint, load_config
from minserve.models.tensor_check import require_tensors
from minserve.models.weights.loader import open_checkpoint

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 538090408\n"
)


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that may be changed."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "models" / "tiny"))


def shard(folder: Path, count: int = 3, stem: str = "model") -> dict[str, torch.Tensor]:
    """Replace a folder's weights by shards without an index; returns the weights."""
    state = weights_of(folder)
    (folder / "model.safetensors").unlink()
    for i in range(count):
        part = dict(list(state.items())[i::count])
        save_file(part, folder / f"{stem}-{i + 1:05}-of-{count:05}.safetensors")
    return state


# ------------------------------------------------------------------------ forms that are read


def test_shards_without_an_index_are_all_read(model):
    state = shard(model)
    assert_reads_all(model, state)
    first = model / "model-00001-of-00003.safetensors"
    assert find_model(str(first)).name == "tiny"
    with open_checkpoint(find_model(str(first))) as checkpoint:
        assert checkpoint.names() == set(state)


def test_shards_of_bin_without_an_index_are_all_read(model):
    state = as_bin(model, shards=2)
    (model / "pytorch_model.bin.index.json").unlink()
    assert_reads_all(model, state)


@pytest.mark.parametrize("name", ["tuned.safetensors", "tuned.bin"])
def test_a_file_of_another_name_is_the_models_where_it_is_the_only_one(model, name):
    state = as_bin(model)
    (model / "pytorch_model.bin").unlink()
    torch.save({}, model / "training_args.bin")
    if name.endswith(".bin"):
        torch.save(state, model / name)
    else:
        save_file(state, model / name)
    assert_reads_all(model, state)
    assert find_model(str(model / name)).name == "tuned"


def test_a_file_named_by_its_path_is_read_even_beside_others(model):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights_of(model).items()}
    save_file(zeros, model / "zeros.safetensors")
    source = find_model(str(model / "zeros.safetensors"))
    assert (source.name, source.config_dir) == ("zeros", model)
    with open_checkpoint(source) as checkpoint:
        assert not any(checkpoint.get(name).any() for name in checkpoint.names())
    assert fingerprint(source) != fingerprint(find_model(str(model)))
    with open_checkpoint(find_model(str(model / "model.safetensors"))) as checkpoint:
        assert checkpoint.get("model.norm.weight").any()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "base_model.model.", "language_model."]
)
def test_a_wrappers_prefix_of_all_names_is_left_out(model, prefix):
    state = weights_of(model)
    save_file({prefix + name: t for name, t in state.items()}, model / "model.safetensors")
    assert_reads_all(model, state)


@pytest.mark.parametrize("name", ["Model.Q4_K_M.gguf", "Model.Q4_K_M.GGUF"])
def test_a_folder_with_one_gguf_file_is_that_model(tmp_path, name):
    file = write_gguf(tmp_path / "folder" / name)
    write_gguf(tmp_path / "folder" / "mmproj-model-f16.gguf")
    for given in (file, file.parent):
        source = find_model(str(given))
        assert (source.name, source.gguf_file) == ("Model.Q4_K_M", file)


def test_a_config_beside_a_gguf_file_does_not_hide_it(model):
    (model / "model.safetensors").unlink()
    file = write_gguf(model / "tiny.gguf")
    assert find_model(str(model)).gguf_file == file


def test_parts_of_a_gguf_file_are_one_model(tmp_path):
    parts = [write_gguf(tmp_path / f"big-0000{i}-of-00003.gguf") for i in (1, 2, 3)]
    source = find_model(str(tmp_path))
    assert (source.name, source.gguf_file) == ("big", parts[0])


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path):
    file = write_gguf(tmp_path / "weights.of.mine")
    assert find_model(str(file)).gguf_file == file


# ------------------------------------------------------------ what is refused, and what is said


def only(folder: Path, **files: str) -> Path:
    """Leave nothing in a folder but these files: names, with __ for a dot, and contents."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def without_weights(folder: Path, *names: str) -> Path:
    """Put files of other names in the place of the weights."""
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"x" * 2000)
    return folder


def pointer(folder: Path, name: str) -> Path:
    (folder / name).write_text(POINTER)
    return folder


def configured(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    kept = json.loads(path.read_text())
    write_json(path, {k: v for k, v in (kept | values).items() if v is not None})
    return folder


def adapter(folder: Path, **more: str) -> Path:
    only(folder, adapter_model__safetensors="x", **more)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    write_json(folder / "adapter_config.json", settings)
    return folder


def lora_names(folder: Path) -> Path:
    state = weights_of(folder)
    state |= {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}
    save_file(state, folder / "model.safetensors")
    return folder


def cut_short(folder: Path, name: str, keep: int) -> Path:
    file = folder / name
    file.write_bytes(file.read_bytes()[:keep])
    return folder


def one_shard_less(folder: Path) -> Path:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    return folder


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def two_gguf_files(folder: Path) -> Path:
    only(folder)
    write_gguf(folder / "a.gguf")
    write_gguf(folder / "b-00001-of-00002.gguf")
    write_gguf(folder / "b-00002-of-00002.gguf")
    return folder


def two_weights(folder: Path) -> Path:
    for name in ("one", "two"):
        shutil.copy(folder / "model.safetensors", folder / f"{name}.safetensors")
    (folder / "model.safetensors").unlink()
    return folder


def moved_weights(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder / "model.safetensors"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "two GGUF files": (two_gguf_files, r"holds 2 models as GGUF files \(a\.gguf, b-00001"),
    "a broken GGUF file": (lambda f: cut_short(two_gguf_files(f), "a.gguf", 4) / "a.gguf", "GGUF"),
    "a pointer for weights": (
        lambda f: pointer(f, "model.safetensors"),
        r"model\.safetensors is a git-lfs pointer.*git lfs pull",
    ),
    "a pointer for the tokenizer": (
        lambda f: pointer(f, "tokenizer.json"),
        r"tokenizer\.json is a git-lfs pointer",
    ),
    "a pointer for the config": (
        lambda f: pointer(f, "config.json"),
        r"config\.json is a git-lfs pointer",
    ),
    "a pointer for GGUF": (lambda f: pointer(only(f), "m.gguf"), r"m\.gguf is a git-lfs pointer"),
    "a pointer by its path": (
        lambda f: pointer(f, "m.gguf") / "m.gguf",
        r"m\.gguf is a git-lfs pointer",
    ),
    "a shard is missing": (
        one_shard_less,
        r"of 3 shards of the weights 1 are missing \(model-00002-of-00003\.safetensors\)",
    ),
    "two files of weights": (two_weights, r"several files.*one\.safetensors, two\.safetensors"),
    "weights without a config": (moved_weights, r"there must be its config\.json"),
    "Mistral's own form": (
        lambda f: without_weights(f, "consolidated.safetensors", "params.json"),
        "Mistral's own form with other tensor names",
    ),
    "Meta's own form": (
        lambda f: only(f, consolidated__00__pth="x", params__json="{}", tokenizer__model="x"),
        r"original form of Meta's Llama.*convert_llama_weights_to_hf",
    ),
    "a file of Meta's own form": (
        lambda f: only(f, consolidated__00__pth="x") / "consolidated.00.pth",
        "original form of Meta's Llama",
    ),
    "torch's own form": (lambda f: without_weights(f, "model.pt"), "save_pretrained"),
    "TensorFlow": (lambda f: without_weights(f, "tf_model.h5"), "TensorFlow alone"),
    "Flax": (lambda f: without_weights(f, "flax_model.msgpack"), "Flax alone"),
    "ONNX": (lambda f: without_weights(f, "model.onnx"), "a model of ONNX"),
    "MLX": (lambda f: without_weights(f, "weights.npz"), "weights of MLX"),
    "a training checkpoint": (lambda f: without_weights(f, "__0_0.distcp"), "in parts"),
    "a pipeline for images": (lambda f: only(f, model_index__json="{}"), "diffusers"),
    "a download that goes on": (
        lambda f: without_weights(f, "model.safetensors.incomplete"),
        "download is not complete",
    ),
    "no weights": (lambda f: without_weights(f), "no weights here"),
    "an empty folder": (only, "this folder is empty"),
    "a folder above models": (lambda f: f.parent, r"in 1 of its folders.*tiny"),
    "an adapter": (adapter, r"LORA adapter.*meta-llama/Llama-3\.2-1B.*merge_and_unload"),
    "an adapter's file": (
        lambda f: adapter(f) / "adapter_model.safetensors",
        r"LORA adapter.*merge_and_unload",
    ),
    "an adapter with a config": (lambda f: adapter(f, config__json="{}"), "LORA adapter"),
    "weights of an adapter": (lora_names, r"holds a LoRA adapter.*lora_A"),
    "a multimodal model": (
        lambda f: configured(f, model_type="gemma3n", text_config={"model_type": "llama"}),
        "multimodal model.*text part is of type 'llama'",
    ),
    "an encoder-decoder": (
        lambda f: configured(f, model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "encoder-decoder",
    ),
    "an encoder": (
        lambda f: configured(f, model_type="xlm-roberta", architectures=["XLMRobertaModel"]),
        "an encoder, for embeddings",
    ),
    "a reward model": (
        lambda f: configured(f, architectures=["LlamaForSequenceClassification"]),
        "a classifier or a reward model",
    ),
    "a mixture of experts": (
        lambda f: configured(f, model_type="newmoe", num_local_experts=8),
        "mixture of experts",
    ),
    "recurrent layers": (lambda f: configured(f, model_type="mamba2"), "state space"),
    "code of its own": (
        lambda f: configured(
            f, model_type="new-thing", auto_map={"AutoModelForCausalLM": "modeling_new.New"}
        ),
        r"modeling_new\.New, trust_remote_code.*no code of a checkpoint is run",
    ),
    "a type with a twin": (
        lambda f: configured(f, model_type="internlm2", auto_map={}),
        r"convert2llama\.py",
    ),
    "no type": (lambda f: configured(f, model_type=None), "names its model_type"),
    "linear RoPE without a factor": (
        lambda f: configured(f, rope_parameters=None, rope_scaling={"type": "linear"}),
        "factor",
    ),
    "Llama 3's RoPE without its fields": (
        lambda f: configured(
            f, rope_parameters=None, rope_scaling={"rope_type": "llama3", "factor": 8.0}
        ),
        "low_freq_factor",
    ),
    "YaRN without a factor": (
        lambda f: configured(f, rope_parameters=None, rope_scaling={"type": "yarn"}),
        "factor",
    ),
    "LongRoPE with short lists": (
        lambda f: configured(
            f,
            rope_parameters=None,
            rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
        ),
        "short_factor|long_factor",
    ),
    "weights cut short": (
        lambda f: cut_short(f, "model.safetensors", 5000),
        r"model\.safetensors.*cut short",
    ),
    "empty weights": (
        lambda f: cut_short(f, "model.safetensors", 0),
        r"model\.safetensors: the file is empty",
    ),
    "an empty config": (lambda f: cut_short(f, "config.json", 0), r"config\.json"),
    "a file of a model": (lambda f: f / "config.json", "one file of a model.*give its folder"),
    "a GGUF file of three bytes": (
        lambda f: write_bytes(f / "m.gguf", b"GGU"),
        r"m\.gguf: not a GGUF file \(3 bytes\)",
    ),
    "an empty GGUF file": (lambda f: write_bytes(f / "m.gguf", b""), r"m\.gguf: the file is empty"),
    "a later Gemma": (
        lambda f: configured(f, model_type="gemma3_text"),
        "Gemma 3 is not supported, and Gemma 1 is",
    ),
    "a name that is nearly right": (
        lambda f: f.parent / "tinny",
        r"no model at .*did you mean .*models/tiny\?$",
    ),
    "a folder above that is nearly right": (
        lambda f: f.parent.parent / "modles" / "tiny",
        r"did you mean .*models/tiny\?",
    ),
}


def prepare(model: Path) -> None:
    """Do what an engine does before it reads weights, in its order."""
    source = find_model(str(model))
    config = load_config(source)
    Tokenizer.load(source)
    with open_checkpoint(source) as checkpoint:
        require_tensors(checkpoint, config)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_explained_before_any_weight_is_read(model, case):
    make, message = REFUSED[case]
    given = make(model)
    with pytest.raises(ModelLoadError, match=message) as error:
        prepare(given)
    assert "\n" not in str(error.value)
    assert str(given.parent) in str(error.value)


def test_what_is_of_another_kind_has_another_class_of_error(model):
    with pytest.raises(UnsupportedModelError):
        find_model(str(adapter(model)))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up the rights of root, if this process has them: root may read everything."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        os.setegid(65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
            os.setegid(group)


@pytest.mark.parametrize("name", [".", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_named(tiny_llama_dir, name):
    # Not in pytest's folders, which only their owner may enter.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        model = Path(shutil.copytree(tiny_llama_dir, Path(place) / "model"))
        for path in (model, *model.iterdir()):
            path.chmod(0o755)
        (model / name).chmod(0)
        with as_nobody(), pytest.raises(ModelLoadError) as error:
            prepare(model)
        (model / name).chmod(0o755)
    assert str(model / name) in str(error.value)
    assert "Permission denied" in str(error.value)
    assert "the right to read" in str(error.value)
