"""A policy is one file and one line in the registry: everything that takes policies takes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minserve.errors import ConfigError
from minserve.planner.policies.registry import POLICIES, make_planner, promising_policies

ROOT = Path(__file__).parents[3]

# The example of a new policy, which promises nothing and starts the newest requests first.
(LIFO,) = re.findall(
    r"^```python\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
# Promises an SLO to the most urgent request alone.
ONE = """
from minserve.planner.admission.timeline import insert_greedily
from minserve.planner.policies.promising import PromisingPlanner


class OnePlanner(PromisingPlanner):
    name = "one"

    def choose(self, candidates, outlook, rates):
        wanted = [c for c in candidates if c.forced] or candidates[:1]
        found = insert_greedily(wanted, outlook, rates)
        at = [candidates.index(c) for c in wanted]
        return type(found)(tuple(at[i] for i in found.accepted), *tuple_of(found))


def tuple_of(found):
    return found.feasible, found.value, found.done_s
"""


@pytest.fixture
def own_policies(tmp_path: Path) -> Path:
    """A folder with two policies, and with programs' start in which they are registered."""
    (tmp_path / "lifo_policy.py").write_text(LIFO)
    (tmp_path / "one_policy.py").write_text(ONE)
    (tmp_path / "sitecustomize.py").write_text(
        "from minserve.planner.policies.registry import POLICIES\n"
        'POLICIES["lifo"] = "lifo_policy:LifoPlanner"\n'
        'POLICIES["one"] = "one_policy:OnePlanner"\n'
    )
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("policy", ["lifo", "one"])
def test_simulate_takes_a_new_policy(own_policies: Path, policy: str) -> None:
    done = run(
        own_policies, "-m", "minserve", "simulate", "--scenario", "chatbot", "--rate", "1",
        "--seconds", "20", "--policy", policy, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"] == policy


@pytest.mark.parametrize("policy", ["lifo", "one"])
def test_the_engine_takes_a_new_policy(
    own_policies: Path, policy: str, tiny_llama_dir: Path
) -> None:
    done = run(
        own_policies, "-m", "minserve", "generate", "--model", str(tiny_llama_dir), "--prompt",
        "Hello", "--max-tokens", "4", "--policy", policy, "--json", "--num-blocks", "64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("command", [("-m", "minserve", "serve"), ("-m", "minserve", "bench")])
def test_servers_offer_a_new_policy(own_policies: Path, command: tuple[str, ...]) -> None:
    done = run(own_policies, *command, "--help")
    assert "{dp,edf,sarathi,fcfs,lifo,one}" in done.stdout.replace("\n", "").replace(" ", "")


def test_the_reproduction_takes_new_policies(own_policies: Path) -> None:
    code = (
        "from parts.reproduce.plan import Plan\n"
        "from parts.reproduce.sections import capacities\n"
        "from shared.simulated.cases import Case\n"
        "from minserve.simulator.simulation import simulate\n"
        "scenario, device = Plan(quick=True).combinations[0]\n"
        "print(*sorted({one[2] for one in capacities(Plan(quick=True))}))\n"
        "for policy in ('lifo', 'one'):\n"
        "    case = Case(scenario=scenario, device=device, policy=policy)\n"
        "    done = simulate(case.workload(1.0, 20, 0), case.setup(0), make=case.make)\n"
        "    print(policy, len(done.verdicts))\n"
    )
    path = os.pathsep.join([str(own_policies), str(ROOT / "bench")])
    done = run(Path(path), "-c", code)
    assert done.returncode == 0, done.stderr
    measured, *lines = done.stdout.splitlines()
    assert {"dp", "edf", "lifo", "one", "vllm"} <= set(measured.split())
    assert lines == ["lifo 20", "one 20"]


def test_every_policy_has_the_name_that_it_is_registered_by() -> None:
    assert {name: make_planner(name).name for name in POLICIES} == {n: n for n in POLICIES}
    assert promising_policies() == ["dp", "edf"]


def test_an_unknown_policy_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'best'; known: dp, edf, sarathi, fcfs"):
        make_planner("best")
