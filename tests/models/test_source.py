"""Where models come from: every place and form that is read, and what is said of all others."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from checkpoints import assert_reads_all, weights_of
from safetensors.torch import save_file
from test_loader import as_bin

from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.loader import open_checkpoint
from minserve.models.source import find_model, fingerprint, load_config
from minserve.models.tensor_check import require_tensors

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 538090408\n"
)
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that may be changed."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "models" / "tiny"))


def write_gguf(path: Path) -> Path:
    """Write the smallest file with a GGUF header: no metadata, no tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    return path


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


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


# --------------------------------------------------------------------------- the hub's cache


@pytest.fixture
def repo(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A repository in a cache of the hub, as huggingface_hub lays it out."""
    folder = tmp_path / "hub" / "models--some-org--some-model"
    shutil.copytree(tiny_llama_dir, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


@pytest.mark.parametrize("below", [".", "snapshots", f"snapshots/{COMMIT}"])
def test_a_folder_of_the_hubs_cache_is_served_under_the_models_name(repo, below):
    (repo / "snapshots" / OTHER_COMMIT).mkdir()
    source = find_model(str(repo / below))
    assert source.name == "some-model"
    assert source.config_dir == repo / "snapshots" / COMMIT


def test_without_a_branch_the_only_commit_counts(repo):
    shutil.rmtree(repo / "refs")
    assert find_model(str(repo)).config_dir.name == COMMIT
    (repo / "snapshots" / OTHER_COMMIT).mkdir()
    with pytest.raises(ModelLoadError, match=rf"none of the 2 commits.*{COMMIT}"):
        find_model(str(repo))


def test_a_whole_cache_names_its_models(repo):
    with pytest.raises(ModelLoadError, match=r"1 model \(some-org/some-model\)") as error:
        find_model(str(repo.parent))
    assert str(repo) in str(error.value)


# ------------------------------------------------------------------------------------ Ollama


def write_ollama(store: Path, names: dict[str, str], media: str = "model") -> dict[str, Path]:
    """Write manifests, by ``name/tag`` each with the digest of its model; returns the blobs."""
    blobs = {}
    for name, digest in names.items():
        layers = [
            {"mediaType": f"application/vnd.ollama.image.{media}", "digest": f"sha256:{digest}"},
            {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:ffff"},
        ]
        write_json(store / "manifests/registry.ollama.ai/library" / name, {"layers": layers})
        blobs[name] = write_gguf(store / "blobs" / f"sha256-{digest}")
    return blobs


@pytest.mark.parametrize("given", ["models", ".", "models/blobs", "models/manifests"])
def test_the_only_model_of_ollama_is_found(tmp_path, given):
    blobs = write_ollama(tmp_path / "models", {"llama3.2/latest": "1234abcd" * 8})
    source = find_model(str(tmp_path / given))
    assert (source.name, source.gguf_file) == ("llama3.2", blobs["llama3.2/latest"])


def test_several_models_of_ollama_are_listed_and_each_can_be_named(tmp_path):
    names = {"llama3.2/latest": "a" * 64, "qwen3/0.6b": "b" * 64, "qwen3/4b": "c" * 64}
    blobs = write_ollama(tmp_path, names)
    with pytest.raises(
        ModelLoadError, match=r"3 models of Ollama.*llama3\.2 .*qwen3:0\.6b"
    ) as error:
        find_model(str(tmp_path))
    library = tmp_path / "manifests/registry.ollama.ai/library"
    assert str(library / "qwen3/4b") in str(error.value)
    for given in (library / "qwen3/4b", blobs["qwen3/4b"]):
        source = find_model(str(given))
        assert (source.name, source.gguf_file) == ("qwen3:4b", blobs["qwen3/4b"])
    assert find_model(str(library / "llama3.2")).name == "llama3.2"


def test_tags_of_one_file_are_one_model(tmp_path):
    write_ollama(tmp_path, {"qwen3/0.6b": "b" * 64, "qwen3/latest": "b" * 64})
    assert find_model(str(tmp_path)).gguf_file == tmp_path / "blobs" / f"sha256-{'b' * 64}"


def test_a_blob_without_a_manifest_has_a_short_name(tmp_path):
    blob = write_gguf(tmp_path / f"sha256-{'d' * 64}")
    assert find_model(str(blob)).name == "sha256-dddddddddddd"


def test_ollamas_store_without_the_model_says_so(tmp_path):
    blobs = write_ollama(tmp_path, {"qwen3/4b": "c" * 64})
    blobs["qwen3/4b"].unlink()
    with pytest.raises(ModelLoadError, match="qwen3:4b is missing; run 'ollama pull qwen3:4b'"):
        find_model(str(tmp_path))


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
    "a name that is nearly right": (
        lambda f: f.parent / "tinny",
        r"no model at .*did you mean .*models/tiny\?",
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


# ------------------------------------------------------------------------------------ the hub


def ask_hub(*models: str, answer_s: float = 10.0, **environment: str) -> list[str]:
    """Look for models in a process of its own: the hub's client reads variables when imported.

    Returns:
        What was found or said of each.
    """
    code = (
        "import sys\n"
        "from minserve.errors import ModelLoadError\n"
        "from minserve.models import hub, source\n"
        "hub.ANSWER_S = float(sys.argv[1])\n"
        "for model in sys.argv[2:]:\n"
        "    try:\n"
        "        print(source.find_model(model))\n"
        "    except ModelLoadError as error:\n"
        "        print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    args = [sys.executable, "-c", code, str(answer_s), *models]
    done = subprocess.run(args, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_hub_that_never_answers_is_given_up(repo):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        models = ("some-org/another", "some-org/some-model")
        where = {"HF_ENDPOINT": url, "HF_HOME": str(repo.parent.parent)}
        refused, found = ask_hub(*models, answer_s=0.3, **where)
    assert "'some-org/another' is not a folder here" in refused
    assert "the hub cannot be reached" in refused
    assert "name='some-model'" in found


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub, for the repositories and files of a dict."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {
        "some-org/ggufs": dict.fromkeys(["README.md", "a.Q4_K_M.gguf", "a.Q8_0.gguf"], b"x"),
        "some-org/data": {"README.md": b"x"},
        "some-org/adapter": {
            "adapter_config.json": b'{"base_model_name_or_path": "some-org/base"}',
            "adapter_model.safetensors": b"x",
        },
        "some-org/model": {
            "config.json": b"{}",
            "tokenizer.json": b"{}",
            "additional_chat_templates/tools.jinja": b"x",
            "model-00001-of-00001.safetensors": b"weights",
            "consolidated.safetensors": b"x",
            "pytorch_model.bin": b"x",
            "onnx/config.json": b"x",
            "README.md": b"x",
        },
    }

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path)
        tree = re.fullmatch(rf"/api/models/([^/]+/[^/]+)/tree/{COMMIT}", path)
        file = re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:{COMMIT}|main)/(.+)", path)
        if api and api[1] in self.files:
            names = [{"rfilename": name} for name in self.files[api[1]]]
            self.answer(json.dumps({"id": api[1], "sha": COMMIT, "siblings": names}).encode())
        elif tree:
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": "0" * 40}
                for name, body in self.files[tree[1]].items()
            ]
            self.answer(json.dumps(entries).encode())
        elif file and file[2] in self.files.get(file[1], {}):
            self.answer(self.files[file[1]][file[2]])
        else:
            self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def test_a_hub_id_is_downloaded_or_what_it_is_instead_is_explained(tmp_path):
    names = ("model", "ggufs", "data", "nothing", "adapter")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        where = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        model, ggufs, data, nothing, adapter = ask_hub(*(f"some-org/{n}" for n in names), **where)
        server.shutdown()
        thread.join()
    assert "name='model'" in model
    folder = tmp_path / "hub" / "models--some-org--model" / "snapshots" / COMMIT
    assert str(folder) in model
    fetched = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    shard, template = "model-00001-of-00001.safetensors", "additional_chat_templates/tools.jinja"
    assert fetched == {"config.json", "tokenizer.json", template, shard}
    assert (folder / shard).read_bytes() == b"weights"
    assert "holds GGUF files (a.Q4_K_M.gguf, a.Q8_0.gguf)" in ggufs
    assert "'hf download some-org/ggufs a.Q4_K_M.gguf'" in ggufs
    assert "'some-org/data' on the Hugging Face hub has no config.json" in data
    assert "'some-org/nothing' is neither a folder here nor a model on the" in nothing
    assert "Merge it into its base model some-org/base" in adapter


def test_nothing_is_downloaded_where_that_is_not_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="nothing is downloaded here"):
        find_model("some-org/some-model", download=False)
