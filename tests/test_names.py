"""One name for one thing: of files beside installed packages, and of classes.

No file or folder here bears the name of a package that something else imports. Whoever starts a script of `bench/` or `examples/`, and pytest for every folder with tests, has
that folder first on `sys.path`: what lies there is found in place of a package of its name.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name for name in ("bench", "examples", "tests")]
# pytest looks for files of the first name and keeps several of them apart; the second stands for
# its folder.
NOT_IMPORTED_BY_NAME = ("conftest", "__init__")
ROOMS = [ROOT / name for name in ("minserve", "kernels", "models", "bench", "examples")]
# Calls that take a package by its name: find_spec, import_module, _is_package_available, ...
PROBES = re.compile(r"find_spec|import|available|version|distribution")
PROBE_BYTES = re.compile(PROBES.pattern.encode())
# Bytes in front of a call's bracket that hold what is called.
LONGEST_CALLED = 200
# What may be an import. The line break and the bracket make it a quick search.
STATEMENT = re.compile(rb"\n[ \t]*(?:import|from)[ \t]+([^\n#(]+)")
STRING_ARGUMENT = re.compile(rb"\([\"'](\w+)[\"'.]")


def own_paths() -> list[Path]:
    """All files and folders that can be imported by whoever has their folder first. A folder
    with nothing but compiled files is what an earlier version left behind.
    """
    files = {
        path
        for folder in FOLDERS
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    modules = {path for path in files if path.suffix == ".py"}
    folders = {parent for path in files for parent in path.parents}
    folders -= {*FOLDERS, ROOT, *ROOT.parents}
    named = sorted(path for path in modules | folders if path.stem.isidentifier())
    return [path for path in named if path.stem not in NOT_IMPORTED_BY_NAME]


def installed_modules() -> Iterator[Path]:
    for root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for folder, _, files in os.walk(root):
            yield from (Path(folder, file) for file in files if file.endswith(".py"))


def may_import(source: bytes) -> set[str]:
    """Every top-level name that `imported` finds, and words of texts: it parses nothing, which
    takes seconds for all files in which some call has a name of ours as its argument.
    """
    words = [word for found in STATEMENT.findall(b"\n" + source) for word in found.split(b",")]
    words += [
        found[1]
        for found in STRING_ARGUMENT.finditer(source)
        if PROBE_BYTES.search(source, max(0, found.start() - LONGEST_CALLED), found.start())
    ]
    return {re.split(rb"[\s.]", word.strip(), maxsplit=1)[0].decode() for word in words}


def imported(source: bytes) -> set[str]:
    """Top-level names that a module imports, or asks for with a call such as `find_spec`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            value = node.args[0].value
            if isinstance(value, str) and PROBES.search(ast.unparse(node.func)):
                names.add(value)
    return {name.split(".")[0] for name in names}


def test_no_name_is_that_of_an_installed_package() -> None:
    taken = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert [str(path) for path in own_paths() if path.stem in taken] == []


def test_no_name_is_that_of_a_package_that_a_dependency_imports() -> None:
    """Nor of one that is not installed: dependencies look for many, and take what they find."""
    own = {path.stem for path in own_paths()}
    found: dict[str, str] = {}
    for path in installed_modules():
        source = path.read_bytes()
        if may_import(source) & own:
            found.update(dict.fromkeys(imported(source) & own, str(path)))
    assert found == {}, "rename them: these modules import something else by that name"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b as c, d\nfrom e.f import g\nfrom . import h\nfrom .i import j", "ade"),
        ("if x:\n    import a\n", "a"),
        ("def f():\n    from a import (\n        b,\n    )", "a"),
        ("find_spec('a')\nimportlib.import_module('b.c')\n_is_package_available('d', True)", "abd"),
        ("print('a')\nopen('b')\nf(x, 'c')", ""),
        ("'''\nimport a\nfrom b import c\n'''", ""),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, names: str) -> None:
    assert imported(source.encode()) == set(names) <= may_import(source.encode())


@pytest.mark.parametrize("first", ["the root", "the other folders"])
def test_transformers_is_imported_whatever_folder_is_first(first: str) -> None:
    """It looks for a package `kernels`, and the root has a folder of that name."""
    folders = {*FOLDERS, *(path.parent for path in own_paths())}
    paths = [ROOT] if first == "the root" else sorted(folders)
    code = (
        f"import sys; sys.path[:0] = {[str(path) for path in paths]}\n"
        "import transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def classes() -> Iterator[tuple[str, Path]]:
    """Name and file of every class, those of tests left out."""
    for path in sorted(path for room in ROOMS for path in room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                yield node.name, path


def test_no_class_name_stands_twice() -> None:
    """A leading underscore does not make another name."""
    files = defaultdict(list)
    for name, path in classes():
        files[name.lstrip("_")].append(str(path))
    twice = {name: paths for name, paths in files.items() if len(paths) > 1}
    assert twice == {}, "one name for one thing: rename all but one of each"


def test_no_file_of_the_package_is_named_after_a_class_that_is_elsewhere() -> None:
    # Kernels are left out: a Triton file is named after the one operation that it holds.
    homes = {ROOT / "minserve", ROOT / "models"}
    files = defaultdict(set)
    for name, path in classes():
        if homes & set(path.parents):
            files[name.lower()].add(path)
    # A command's file is named after the command.
    commands = ROOT / "minserve" / "cli"
    modules = [path for home in homes for path in home.rglob("*.py") if path.parent != commands]
    promised = {path: files.get(path.stem.replace("_", ""), {path}) for path in modules}
    assert [str(path) for path, found in promised.items() if path not in found] == []
