"""What is said once about the package holds everywhere: its version, its licence, and the
versions of other packages with which the tests have passed.
"""

from __future__ import annotations

import re
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minserve

ROOT = Path(__file__).parents[1]
# It builds against one CUDA torch, and no test here runs it.
UNTESTED = "flash-attn"


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_every_dependency_has_a_tested_version_within_its_range() -> None:
    pinned = pinned_versions()
    needed = [Requirement(one) for one in requires("minserve") or ()]
    assert len(needed) > 20
    for one in needed:
        if one.name != UNTESTED:
            version = pinned[canonicalize_name(one.name)]
            assert one.specifier.contains(version), f"{one} does not allow {version}"


def test_tested_versions_fit_builds_of_torch_for_any_device() -> None:
    version = pinned_versions()["torch"]
    pinned = Requirement(f"torch=={version}").specifier
    for build in (version, f"{version}+cpu", f"{version}+cu130"):
        assert pinned.contains(build)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_packages_whose_private_names_are_used_have_an_upper_bound(name: str) -> None:
    (one,) = (one for one in map(Requirement, requires("minserve") or ()) if one.name == name)
    assert not one.specifier.contains("99.0")


def test_metadata_has_the_version_and_the_licence_of_the_source() -> None:
    told = metadata("minserve")
    assert told["Version"] == minserve.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert "Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)[0] == minserve.__version__


def test_the_guide_for_contributors_names_files_that_exist() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[`(]([\w./-]+/[\w./-]+|\w+\.(?:py|md|txt))[`)]", guide))
    assert len(named) > 20
    places = (
        ROOT,
        ROOT / "minserve/engine",
        ROOT / "minserve/server",
        ROOT / "minserve/planner/policies",
    )
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert missing == []
