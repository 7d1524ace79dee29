"""`scripts/install.sh`: it says what it does, and what is missing, in a line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a fresh clone has for `make`, without the packages."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/install.sh", tmp_path / "scripts")
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def make(clone: Path, python: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user does; under `make test` it would take itself for a part of that."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return subprocess.run(
        ["make", ".venv/.installed", f"PYTHON={python}"],
        cwd=clone,
        env={name: value for name, value in os.environ.items() if name not in outer} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def own_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what was said before make's own last words."""
    assert done.returncode != 0
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if not line.startswith("make: ***")]


def test_a_python_that_is_not_there_is_named_in_one_line(clone: Path) -> None:
    (line,) = own_lines(make(clone, "nosuch"))
    assert "there is no program 'nosuch'" in line
    assert "make PYTHON=python3.12" in line
    assert not (clone / ".venv").exists()


def test_the_script_says_it_too(clone: Path) -> None:
    done = subprocess.run(
        ["scripts/install.sh"], cwd=clone, env={**os.environ, "PYTHON": "nosuch"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("minserve: error: there is no program 'nosuch'")


def test_too_old_a_python_is_told_its_version(clone: Path) -> None:
    old = program(clone / "old", '[ "$1" = -V ] && echo Python 3.9.2 || exit 1')
    (line,) = own_lines(make(clone, old))
    assert "needs Python 3.11 or newer" in line
    assert "is Python 3.9.2" in line


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_environments_is_told_what_to_install(clone: Path, module: str) -> None:
    # As in Debian, which has these modules in packages of their own.
    blocked = clone / "blocked" / f"{module}.py"
    blocked.parent.mkdir()
    blocked.write_text(f"raise ModuleNotFoundError('No module named {module}')\n")
    python = program(clone / "python", f'PYTHONPATH={blocked.parent} exec {sys.executable} "$@"')
    (line,) = own_lines(make(clone, python))
    assert "apt-get install python3-venv" in line
    assert not (clone / ".venv").exists()


def test_where_pip_fails_its_own_words_are_shown(clone: Path) -> None:
    # An environment of its own that sees this one's pip and nothing else of it.
    venv.create(clone / ".venv", symlinks=True, with_pip=False)
    (clone / "packages").mkdir()
    (clone / "packages/pip").symlink_to(Path(pip.__file__).parent)
    nowhere = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    done = make(
        clone, sys.executable, PYTHONPATH=str(clone / "packages"), PATH="/usr/bin:/bin", **nowhere
    )
    said = "\n".join(own_lines(done))
    assert "No matching distribution found for uv" in said
    assert "minserve: error: installing failed; pip's words are above, and in .venv/pip.log" in said
    assert "Installing torch" in done.stdout


def test_large_steps_are_shown_and_small_ones_are_not(clone: Path) -> None:
    text = (clone / "scripts/install.sh").read_text()
    function = text[text.index("large_steps() {") : text.index("\npip() {")]
    pip_says = (
        "Collecting numpy>=1.26\n"
        "  Downloading numpy-2.3.1-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (62 kB)\n"
        "  Downloading numpy-2.3.1-cp311-cp311-manylinux_2_28_x86_64.whl (16.6 MB)\n"
        "  Using cached idna-3.10-py3-none-any.whl (70 kB)\n"
        "Installing collected packages: idna, numpy\n"
        "Successfully installed idna-3.10 numpy-2.3.1\n"
    )
    done = subprocess.run(
        ["bash", "-c", f"{function}\nlarge_steps"], input=pip_says, capture_output=True, text=True
    )
    assert done.stdout == "  downloading numpy (16.6 MB)\n  unpacking 2 packages\n"
