"""An engine as a GPU runs it, on packed weights: outputs and likelihoods of the CPU's path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoints import weights_of
from safetensors.torch import save_file
from speculating import SETTINGS
from test_triton_engine import as_on_a_gpu

from minserve import Engine, SamplingParams
from minserve.engine import build
from minserve.models.layers import WeightFormat, WeightPlacement

CPU = torch.device("cpu")
PROMPTS = ["one two three four five six seven", "x"]
PARAMS = SamplingParams(temperature=0.0, max_tokens=3, logprobs=1, ignore_eos=True)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def awq_parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values of random bits: a model of four bits that are anything."""
    outputs, inputs = weight.shape
    rng = torch.Generator().manual_seed(outputs + inputs)
    words = torch.randint(-(2**31), 2**31, (inputs, outputs // 8), generator=rng)
    zeros = torch.randint(-(2**31), 2**31, (inputs // 32, outputs // 8), generator=rng)
    scale = 0.01 + 0.02 * torch.rand(inputs // 32, outputs, generator=rng)
    return {
        "qweight": words.to(torch.int32), "qzeros": zeros.to(torch.int32), "scales": scale.half(),
    }  # fmt: skip


def quantize(like: Path, to: Path) -> Path:
    """Write a folder whose layers' linears are quantized."""
    shutil.copytree(like, to)
    tensors = {}
    for name, weight in weights_of(like).items():
        linear, _, kind = name.rpartition(".")
        packed = awq_parts(weight) if linear.endswith("_proj") else {kind: weight}
        tensors |= {f"{linear}.{part}": one.contiguous() for part, one in packed.items()}
    save_file(tensors, to / "model.safetensors")
    config = json.loads((to / "config.json").read_text()) | {"quantization_config": AWQ}
    (to / "config.json").write_text(json.dumps(config))
    return to


def answers(engine: Engine) -> list[tuple[list[int], list[float]]]:
    found = [result.outputs[0] for result in engine.generate(PROMPTS, PARAMS)]
    return [(list(o.token_ids), [one.logprob for one in o.logprobs or ()]) for o in found]


def test_outputs_are_those_of_unpacked_weights(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(quantize(tiny_llama_dir, tmp_path / "packed"))
    config = SETTINGS | {"num_blocks": 20}
    want = answers(Engine(folder, **config, device="cpu", attention_backend="torch"))
    if torch.cuda.is_available():
        engine = Engine(folder, **config, attention_backend="triton")
    else:
        where = WeightPlacement(
            CPU, torch.float32, torch.float32, WeightFormat.DENSE, fused=True, packed=True
        )
        with mock.patch.object(build, "choose_placement", return_value=where):
            engine = Engine(folder, **config, attention_backend="triton")
        as_on_a_gpu(engine, monkeypatch)
    got = answers(engine)
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    for (_, ours), (_, theirs) in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
