"""Who may import whom, as the design says: downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {
    "minserve": ROOT / "minserve",
    "minserve.kernels": ROOT / "kernels",
    "minserve.models": ROOT / "models",
}

# A room may import itself, its neighbours named here, and the ground.
GROUND = {
    "access_names",
    "activity",
    "blocks",
    "cgroups",
    "chat_formats",
    "cpu_name",
    "errors",
    "devices",
    "exit_codes",
    "log_lines",
    "machine",
    "process_ends",
    "progress_bar",
    "config",
    "request",
    "sampling_params",
    "slo",
    "slots",
    "structure",
    "tables",
    "outputs",
    "process_config",
    "server_config",
    "prompts",
    "planner",
}
ALLOWED: dict[str, set[str]] = {
    **{room: set() for room in GROUND},
    "kernels": set(),
    "models": {"kernels"},
    "engine": {"kernels", "models"},
    "server": {"engine"},
    "workload": set(),
    "controller": {"engine", ""},
    "simulator": {"engine", "workload", "controller"},
    "interrupt": set(),
    "cli": {"models", "engine", "server", "workload", "controller", "simulator", "interrupt", ""},
    "__main__": {"cli"},
    "": {"engine"},  # minserve/__init__.py
}


# The planner's rooms, each with those that it may import beside the files of `planner/` itself.
PLANNER_ROOMS: dict[str, set[str]] = {
    "predict": set(),
    "batching": {"predict"},
    "admission": {"predict", "batching"},
    "policies": {"predict", "batching", "admission"},
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for prefix, folder in HOMES.items():
        for path in folder.rglob("*.py"):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def planner_room(module: str) -> str:
    """Return the room of the planner that a module is in, else an empty text."""
    return module.split(".")[2] if module.startswith("minserve.planner.") else ""


def imports(path: Path) -> set[str]:
    """Modules of minserve, and torch, that a file imports (type-checking blocks left out)."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(
                f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in ALL
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {n for n in names if n.split(".")[0] in ("minserve", "torch")}


ALL = modules()


@pytest.mark.parametrize("module", sorted(ALL))
def test_a_module_imports_only_downwards(module: str) -> None:
    here = room(module)
    assert here in ALLOWED, f"{module}: give the room {here!r} its place in this test"
    for name in imports(ALL[module]):
        if name.startswith("minserve"):
            there = room(name)
            assert there == here or there in GROUND | ALLOWED[here], f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(one for one in ALL if room(one) == "planner"))
def test_a_room_of_the_planner_imports_only_downwards(module: str) -> None:
    here = planner_room(module)
    for name in imports(ALL[module]):
        there = planner_room(name)
        if here in PLANNER_ROOMS and there in PLANNER_ROOMS:
            assert there == here or there in PLANNER_ROOMS[here], f"{module} imports {name}"


@pytest.mark.parametrize(
    ("names", "without"),
    [
        (
            sorted(GROUND - {"planner", "slo"} | {"slo.objectives", "slo.slo_fields"}),
            ("torch", "numpy"),
        ),
        (["planner.policies", "planner.predict.perf_fit"], ("torch", "aiohttp")),
        (["models.registry", "models.draft_model"], ("triton",)),
        (["models.finding.source", "server.lifecycle"], ("torch", "transformers")),
    ],
    ids=["the face and the ground", "the planner", "the models", "finding a model"],
)
def test_the_ground_does_without(names: list[str], without: tuple[str, ...]) -> None:
    modules = ", ".join(f"minserve.{name}" for name in names)
    code = f"import sys, minserve, {modules}; sys.exit(any(m in sys.modules for m in {without}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_server_knows_the_engine_by_its_public_face() -> None:
    for module, path in ALL.items():
        if room(module) == "server":
            engine_side = {n for n in imports(path) if n.startswith("minserve.engine")}
            assert not engine_side, (
                f"{module} imports {engine_side}; use `from minserve import ...`"
            )
