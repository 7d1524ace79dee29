"""What the tests of every checkpoint format share."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

from minserve.models.loader import open_checkpoint
from minserve.models.source import find_model

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
