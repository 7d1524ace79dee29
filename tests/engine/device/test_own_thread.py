"""Work for a GPU before batches run: in a thread that ends with it."""

from __future__ import annotations

import threading

import pytest
import torch

from minserve.engine.device.own_thread import apart

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_what_is_done_for_a_gpu_is_done_in_a_thread_that_ends() -> None:
    thread = apart(CUDA, threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_on_a_cpu_the_caller_does_it() -> None:
    assert apart(CPU, threading.current_thread) is threading.current_thread()


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_its_error_is_the_callers(device: torch.device) -> None:
    with pytest.raises(ZeroDivisionError):
        apart(device, lambda: 1 // 0)


def test_the_current_gpu_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert apart(CUDA, lambda: list(chosen)) == [3]
