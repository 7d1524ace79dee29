"""Which attention backend is chosen where."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from minserve.errors import BackendUnavailableError
from minserve.kernels.attention import choose_attention_backend, make_attention_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_takes_plain_torch() -> None:
    assert choose_attention_backend("auto", CPU) == "torch"
    assert make_attention_backend("torch", 2, 2, 8, 1.0).name == "torch"


def test_a_backend_asked_for_by_name_fails_where_it_cannot_run() -> None:
    # In a process of its own: here Triton's interpreter would run it.
    code = (
        "import torch; from minserve.kernels.attention import choose_attention_backend as choose; "
        "choose('triton', torch.device('cpu'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "cannot run here: it needs a CUDA device" in run.stderr.splitlines()[-1]


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendUnavailableError, match="'fast'; known: auto, torch, triton, flash"):
        choose_attention_backend("fast", CPU)
    with pytest.raises(BackendUnavailableError, match="unknown attention backend 'fast'"):
        make_attention_backend("fast", 2, 2, 8, 1.0)


@pytest.mark.parametrize("head_dim", [8, 36, 264])
def test_heads_that_the_kernels_do_not_know_are_refused(head_dim: int) -> None:
    with pytest.raises(BackendUnavailableError, match=f"not {head_dim}; use --attention-backend"):
        make_attention_backend("triton", 2, 2, head_dim, 1.0)


def test_without_flash_attn_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install .*'minserve\[flash-attn\]'"):
        choose_attention_backend("flash-attn", GPU if torch.cuda.is_available() else CPU)


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "triton"), ((7, 5), "torch")])
def test_a_gpu_takes_triton_where_it_is_new_enough(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_attention_backend("auto", GPU) == chosen
    if chosen == "torch":
        with pytest.raises(BackendUnavailableError, match=r"compute capability 8\.0 or newer"):
            choose_attention_backend("triton", GPU)
