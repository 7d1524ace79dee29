"""Model folders whose linears are quantized, beside their plain twins, and what they compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoints import weights_of
from packers import Form
from safetensors.torch import load_file, save_file
from torch import Tensor

from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.paged_model import PagedModel
from minserve.kernels.attention import make_attention_backend
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightFormat, WeightPlacement
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WEIGHTS = "model.safetensors"
PLAIN = WeightPlacement(CPU, torch.float32, torch.float32, WeightFormat.DENSE)
# As on a GPU, which stands in for itself where there is one.
ON_GPU = WeightPlacement(
    DEVICE, torch.float32, torch.float32, WeightFormat.DENSE, fused=True, packed=True
)


def write(folder: Path, like: Path, tensors: dict[str, Tensor], settings: Any = None) -> Path:
    """Write a model folder with the configuration of another one."""
    folder.mkdir()
    shutil.copy(like / "config.json", folder)
    set_settings(folder, settings)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / WEIGHTS)
    return folder


def set_settings(folder: Path, settings: Any, key: str = "quantization_config") -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if settings is not None:
        config[key] = settings
    (folder / "config.json").write_text(json.dumps(config))


def quantized(form: Form, like: Path, to: Path) -> tuple[Path, Path]:
    """Write a folder whose linears are random ones in a form, and its plain twin.

    As usual, the head is not quantized.
    """
    rng = torch.Generator().manual_seed(0)
    plain, packed = weights_of(like), {}
    for name, weight in list(plain.items()):
        linear = name.removesuffix(".weight")
        if linear.endswith("_proj"):
            made = form.make(*weight.shape, rng)
            packed |= {f"{linear}.{part}": one for part, one in made.stored.items()}
            plain[name] = made.weight
        else:
            packed[name] = weight
    return write(to / "packed", like, packed, form.settings), write(to / "plain", like, plain)


def change(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors of a folder, or remove them."""
    tensors = load_file(folder / WEIGHTS) | changes
    kept = {name: one.contiguous() for name, one in tensors.items() if one is not None}
    save_file(kept, folder / WEIGHTS)


@torch.inference_mode()
def logits(folder: Path, where: WeightPlacement = PLAIN, *, also_decode: bool = False) -> Tensor:
    """Of a prompt, and perhaps of a token after it, in float32."""
    source = find_model(str(folder))
    with open_checkpoint(source, progress=False) as checkpoint:
        checkpoint.keeps_packed = where.packed
        model = build_model(checkpoint, load_config(source), where)
    s, name = model.shape, "triton" if where.fused else "torch"
    backend = make_attention_backend(name, s.num_heads, s.num_kv_heads, s.head_dim, s.scale)
    kv = [backend.allocate(2, 16, torch.float32, where.device) for _ in range(s.num_layers)]
    paged = PagedModel(model, backend, kv, 16, where.device)
    hidden = paged.forward([Chunk(range(3, 20), 0, [1, 0])], 0)
    if also_decode:
        hidden = torch.cat([hidden, paged.forward([Chunk([7], 17, [1, 0])], 1)])
    return model.logits(hidden)
