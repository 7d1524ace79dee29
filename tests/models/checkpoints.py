"""What the tests of every checkpoint format share."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

from minserve.models.finding.source import find_model
from minserve.models.weights.loader import open_checkpoint

# Of the tiny Llama.
HEADS, KV_HEADS = 4, 2
NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_reads_all(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(find_model(str(folder))) as ckpt:
        assert ckpt.names() == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(ckpt.get(name, tuple(tensor.shape)), tensor), name


def write_gguf(path: Path) -> Path:
    """Write the smallest file with a GGUF header: no metadata, no tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    return path


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def as_bin(folder: Path, shards: int = 1, **save_options) -> dict[str, torch.Tensor]:
    """Replace a folder's safetensors by .bin files; returns the weights."""
    state = weights_of(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **save_options)
        return state
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = dict(list(state.items())[i::shards])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return state
