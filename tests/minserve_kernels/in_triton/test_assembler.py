"""The assembler for Hopper: the newer of Triton's two, where the driver knows its code."""

from __future__ import annotations

import functools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minserve.kernels.triton import assembler

OLDER = SimpleNamespace(path="of/ptxas", version="12.8")
NEWER = SimpleNamespace(path="of/ptxas-blackwell", version="13.1")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton of two assemblers that takes the older one for Hopper, as 3.7 does."""
    monkeypatch.setattr(
        assembler, "knobs", SimpleNamespace(nvidia=SimpleNamespace(ptxas_blackwell=NEWER))
    )
    fake = SimpleNamespace(get_ptxas=lambda arch: NEWER if arch >= 100 else OLDER)
    fake.get_ptxas_version = functools.cache(lambda arch: fake.get_ptxas(arch).version)
    monkeypatch.setattr(assembler, "compiler", fake)
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)


def chosen(cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The assemblers for an A100, an H100 and a B200, beside a torch of a version of CUDA."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assembler.use_newer_assembler()
    return [assembler.compiler.get_ptxas(arch) for arch in (80, 90, 100)]


@pytest.mark.parametrize(
    ("cuda", "hopper"),
    [("13.0", NEWER), (None, NEWER), ("12.8", OLDER)],
    ids=["torch of CUDA 13", "torch without CUDA", "a driver may be of CUDA 12"],
)
def test_it_is_the_newer_one_where_torchs_driver_knows_its_code(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, hopper: SimpleNamespace
) -> None:
    assert chosen(cuda, monkeypatch) == [OLDER, hopper, NEWER]


def test_what_triton_has_is_kept_where_it_is_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler.knobs.nvidia, "ptxas_blackwell", OLDER)
    assert chosen("13.0", monkeypatch) == [OLDER, OLDER, NEWER]


def test_a_users_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", OLDER.path)
    assert chosen("13.0", monkeypatch) == [OLDER, OLDER, NEWER]


def test_what_was_made_by_the_other_is_not_taken_for_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Triton has compiled something in this process, and kept the version for the keys of its cache.
    assert assembler.compiler.get_ptxas_version(90) == OLDER.version
    chosen("13.0", monkeypatch)
    assert assembler.compiler.get_ptxas_version(90) == NEWER.version


class Broken:
    """Triton's settings where one of its programs cannot be had."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def ptxas_blackwell(self) -> SimpleNamespace:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Cannot find ptxas-blackwell"),
        PermissionError("of/ptxas-blackwell"),
        AttributeError("ptxas_blackwell"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_triton_with_one_assembler_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(assembler.knobs, "nvidia", Broken(error))
    assert chosen("13.0", monkeypatch) == [OLDER, OLDER, NEWER]


@pytest.mark.parametrize("cuda", ["13.0rc1", "unknown"])
def test_nothing_is_changed_beside_a_cuda_of_unknown_version(
    monkeypatch: pytest.MonkeyPatch, cuda: str
) -> None:
    assert chosen(cuda, monkeypatch) == [OLDER, OLDER, NEWER]


def test_a_triton_for_other_gpus_needs_no_assembler() -> None:
    code = (
        "import sys, triton; sys.modules['triton.backends.nvidia'] = None\n"
        "from minserve.kernels.triton import assembler; assert assembler.compiler is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_tells_its_assemblers_as_is_expected_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for tool in (assembler.compiler.get_ptxas(90), assembler.knobs.nvidia.ptxas_blackwell):
        assert assembler._numbers(tool.version) > (12, 0)
