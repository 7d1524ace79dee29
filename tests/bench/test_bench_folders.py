"""Programs of `bench/` do not import each other; what two of them use is in `shared/`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PROGRAMS = {path.stem: path for path in BENCH.glob("*.py")}
# Folders of parts whose program is no Python file.
SCRIPTS = {name: BENCH / f"{name}.sh" for name in ("clients", "gpu")}
FILES = sorted(BENCH.rglob("*.py"))


def imports(path: Path) -> Iterator[list[str]]:
    """The dotted names that a file imports, in parts; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


def owner(path: Path) -> str:
    """The program that a file belongs to, or `shared`."""
    parts = path.relative_to(BENCH).with_suffix("").parts
    return parts[1] if parts[0] == "parts" else parts[0]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(BENCH)) for path in FILES])
def test_a_file_imports_its_own_parts_and_what_is_shared(path: Path) -> None:
    own = owner(path)
    for name in imports(path):
        assert name[0] not in PROGRAMS, f"{'.'.join(name)} is a program"
        if name[0] == "parts":
            assert name[1] == own, f"{'.'.join(name)} is a part of another program"


def test_every_file_at_the_top_is_a_program() -> None:
    assert [
        n for n, p in PROGRAMS.items() if 'if __name__ == "__main__":' not in p.read_text()
    ] == []


def test_the_readme_of_the_folder_names_every_program() -> None:
    named = re.findall(r"^\| `(\w+)\.py` \|", (BENCH / "README.md").read_text(), re.MULTILINE)
    assert named == sorted(PROGRAMS)


def test_every_folder_of_parts_has_its_program() -> None:
    folders = {path.name for path in (BENCH / "parts").iterdir() if path.name[0] != "_"}
    assert folders
    assert folders <= {*PROGRAMS, *SCRIPTS}
    assert all(path.exists() for path in SCRIPTS.values())


def test_whatever_is_shared_has_more_than_one_user() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        for name in imports(path):
            if name[0] == "shared":
                found = [
                    BENCH.joinpath(*name[:n]).with_suffix(".py") for n in range(2, len(name) + 1)
                ]
                used.setdefault(str(next(f for f in found if f.exists())), set()).add(str(path))
    shared = [path for path in (BENCH / "shared").rglob("*.py") if path.name != "__init__.py"]

    # Parts of one idea, such as `shared/paired`, count together.
    def users(path: Path) -> set[str]:
        return {
            program
            for user in used.get(str(path), ())
            for program in (
                users(Path(user)) if owner(Path(user)) == "shared" else {owner(Path(user))}
            )
        }

    assert {
        str(path.relative_to(BENCH)): users(path) for path in shared if len(users(path)) < 2
    } == {}


@pytest.mark.parametrize("name", ["engine_gpu", "kernel_bench"])
def test_help_needs_no_triton(name: str, tmp_path: Path) -> None:
    # As in the environment of `make serve` on a CPU.
    (tmp_path / "triton.py").write_text('raise ModuleNotFoundError("No module named triton")')
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(PROGRAMS[name]), "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--dry" in done.stdout
