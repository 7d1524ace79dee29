"""A GPU that torch cannot use: said in one line, and an error where it was asked for."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch

from minserve.engine.device import device_choice
from minserve.engine.device.device_choice import choose_device
from minserve.errors import ConfigError

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n"


def no_cuda() -> bool:
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=2)
    return False


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a GPU, and a driver that is too old for torch."""
    device, driver = tmp_path / "nvidiactl", tmp_path / "version"
    device.touch()
    driver.write_text(DRIVER)
    monkeypatch.setattr(device_choice, "NVIDIA_DEVICE", device)
    monkeypatch.setattr(device_choice, "NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", no_cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("machine")
def test_auto_falls_back_to_the_cpu_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto").type == "cpu"
    (record,) = caplog.records
    words = record.getMessage()
    assert "CUDA 13.0" in words
    assert "driver 470.82.01" in words
    assert words.endswith("running on the CPU")
    assert "\n" not in words


@pytest.mark.usefixtures("machine")
def test_a_gpu_that_was_asked_for_and_cannot_be_used_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"driver 470\.82\.01; update the driver"):
        choose_device("cuda")


@pytest.mark.usefixtures("machine")
def test_a_torch_without_cuda_beside_a_gpu_is_said_as_such(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_device("auto").type == "cpu"
    assert "has no CUDA in it" in caplog.text


@pytest.mark.parametrize("how", ["no GPU", "hidden", "asked for the cpu"])
def test_whoever_has_no_gpu_to_use_is_told_nothing(
    how: str, machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "no GPU":
        (machine / "nvidiactl").unlink()
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            choose_device("cuda")
    if how == "hidden":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("cpu" if how == "asked for the cpu" else "auto").type == "cpu"
    assert not caplog.records
