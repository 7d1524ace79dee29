"""Models of the hub: folders of its cache, and what becomes of a hub id with and without a network."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from minserve.errors import ModelLoadError
from minserve.models.finding.source import find_model

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


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


def ask_hub(*models: str, answer_s: float = 10.0, **environment: str) -> list[str]:
    """Look for models in a process of its own: the hub's client reads variables when imported.

    Returns:
        What was found or said of each.
    """
    code = (
        "import sys\n"
        "from minserve.errors import ModelLoadError\n"
        "from minserve.models.finding import hub, source\n"
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
    with pytest.raises(ModelLoadError, match="inspect downloads nothing: run"):
        find_model("some-org/some-model", download=False)
