"""The assembler for GPUs before Blackwell: the newer of Triton's two, where the driver knows its code."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from minserve.kernels.triton import assembler

OWN = "of/ptxas"


@pytest.fixture
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton whose assemblers are of CUDA 12.8 and 13.1, without a choice of the user's."""
    tools = {
        "ptxas": SimpleNamespace(path=OWN, version="12.8"),
        "ptxas_blackwell": SimpleNamespace(path="of/ptxas-blackwell", version="13.1"),
    }
    fake = SimpleNamespace(
        nvidia=SimpleNamespace(**tools), runtime=SimpleNamespace(interpret=False)
    )
    monkeypatch.setattr(assembler, "knobs", fake)
    # Set and taken away, so that what the test leaves is taken away too.
    monkeypatch.setenv(assembler.VARIABLE, "")
    monkeypatch.delenv(assembler.VARIABLE)


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(
    ("cuda", "chosen"),
    [("13.0", "of/ptxas-blackwell"), (None, "of/ptxas-blackwell"), ("12.8", None)],
    ids=["torch of CUDA 13", "torch without CUDA", "a driver may be of CUDA 12"],
)
def test_it_is_the_newer_one_where_torchs_driver_knows_its_code(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, chosen: str | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assembler.use_newer_assembler()
    assert os.environ.get(assembler.VARIABLE) == chosen


@pytest.mark.usefixtures("_triton")
def test_what_triton_has_is_kept_where_it_is_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler.knobs.nvidia.ptxas, "version", "13.1")
    assembler.use_newer_assembler()
    assert assembler.VARIABLE not in os.environ


@pytest.mark.usefixtures("_triton")
def test_a_users_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assembler.VARIABLE, OWN)
    assembler.use_newer_assembler()
    assert os.environ[assembler.VARIABLE] == OWN


def test_tritons_own_assemblers_have_versions_that_can_be_compared() -> None:
    nvidia = assembler.knobs.nvidia
    for tool in (nvidia.ptxas, nvidia.ptxas_blackwell):
        assert assembler._numbers(tool.version) > (12, 0)
