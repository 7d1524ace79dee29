"""Environments of the peers: what is made when, and what is said where it cannot be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shared import peers as offline_peers
from shared.contending_servers import vllm_variant
from shared.peers import LLAMA_CPP_VERSION, gguf_of, llama_cpp_python, vllm_python


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run, in a cache of its own."""
    found: list[list[str]] = []

    def run(command: list[str], **_: str) -> None:
        found.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(offline_peers, "CACHE", tmp_path)
    monkeypatch.setattr(offline_peers, "_run", run)
    monkeypatch.setattr(offline_peers.shutil, "which", lambda _: "/usr/bin/c++")
    return found


@pytest.mark.parametrize("make", [vllm_python, llama_cpp_python])
def test_an_environment_is_made_once(make, commands: list[list[str]]) -> None:
    python = make()
    assert any("venv" in command for command in commands)
    assert all(command[0] in (python, "nice") for command in commands[1:])
    done = len(commands)
    assert make() == python
    assert len(commands) == done


def test_without_a_compiler_one_is_asked_for_before_anything_is_made(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline_peers.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        llama_cpp_python()
    assert commands == []


def test_a_build_that_fails_is_tried_again_the_next_time(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = offline_peers._run

    def failing(command: list[str], **env: str) -> None:
        run(command, **env)
        if "install" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(offline_peers, "_run", failing)
    with pytest.raises(SystemExit, match="did not build"):
        llama_cpp_python()
    assert any("install" in command for command in commands)
    assert not (tmp_path / f"llama-cpp-{LLAMA_CPP_VERSION}" / "ready").exists()


def test_llama_cpp_is_given_gguf_files_alone(tiny_llama_dir: Path) -> None:
    assert gguf_of("smollm2").endswith(".gguf")
    with pytest.raises(SystemExit, match="reads GGUF files"):
        gguf_of(str(tiny_llama_dir))


def test_vllm_chooses_its_cores_unless_they_are_bound() -> None:
    default = vllm_variant("/env/bin/python", "/model", "bfloat16", None, None)
    bound = vllm_variant("/env/bin/python", "/model", "bfloat16", None, "0,1")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in default.env
    assert bound.env == {**default.env, "VLLM_CPU_OMP_THREADS_BIND": "0,1"}
