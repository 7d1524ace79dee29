"""How long reading a model's weights takes, by the form in which they are stored.

The model is an eighth of a Llama-3.1-8B: 4 of its 32 layers and an eighth of its vocabulary, with
random weights. Each form is written to a temporary file (up to 2 GB) and read in turns: once
without more (what dequantizing takes), and once with repacking for this machine. The last line is
JSON, with times for a whole 8B, eight times as long.

    .venv/bin/python bench/loading.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from minserve.machine import Machine
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint
from minserve.progress_bar import progress_bar
from minserve.tables import text_table

LAYERS, SHARE = 4, 8
HIDDEN, INNER, KV, VOCAB = 4096, 14336, 1024, 16032
SCALE = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
# Bytes of a block that hold a scale: other bits would make numbers that no model has.
SCALES = {Type.Q8_0: (0,), Type.Q4_K: (0, 2), Type.Q6_K: (208,)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3, help="times that each form is read")
    args = parser.parse_args()
    torch.set_num_threads(Machine.look().num_threads)
    forms: dict[str, Callable[[str], Type]] = {
        "GGUF Q4_K_M": _q4_k_m,
        "GGUF Q8_0": lambda _: Type.Q8_0,
        "GGUF F16": lambda _: Type.F16,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in progress_bar(forms.items(), desc="Writing", unit="file"):
            _write(_file(folder, name), kind)
        for name in progress_bar([*forms] * args.turns, desc="Reading", unit="turn"):
            times[name].append(_read(_file(folder, name)))
    rows = {
        name: [SHARE * statistics.median(one) for one in zip(*taken, strict=True)]
        for name, taken in times.items()
    }
    print(
        text_table(
            ("form", "read, s for 8B", "read and repacked, s for 8B"),
            [(name, f"{read:.1f}", f"{whole:.1f}") for name, (read, whole) in rows.items()],
        )
    )
    print(json.dumps({name: [round(s, 2) for s in both] for name, both in rows.items()}))


def _file(folder: str, name: str) -> Path:
    return Path(folder) / f"{name.replace(' ', '-')}.gguf"


def _q4_k_m(name: str) -> Type:
    """Return the type of a tensor as llama.cpp's mix of this name has it, about."""
    more = name == "output.weight" or any(f".{part}." in name for part in ("ffn_down", "attn_v"))
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    return Type.Q6_K if more and layer % 2 == 0 else Type.Q4_K


def _write(path: Path, kind_of: Callable[[str], Type]) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in _tensors():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        kind = kind_of(name)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind is Type.F16:
            writer.add_tensor(name, rng.random(shape, np.float32).astype(np.float16))
            continue
        blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, block_bytes), np.uint8)
        for at in SCALES[kind]:
            blocks[:, at : at + 2] = SCALE
        writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (VOCAB, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    yield "output.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in (
            ("attn_norm", (HIDDEN,)),
            ("attn_q", (HIDDEN, HIDDEN)),
            ("attn_k", (KV, HIDDEN)),
            ("attn_v", (KV, HIDDEN)),
            ("attn_output", (HIDDEN, HIDDEN)),
            ("ffn_norm", (HIDDEN,)),
            ("ffn_gate", (INNER, HIDDEN)),
            ("ffn_up", (INNER, HIDDEN)),
            ("ffn_down", (HIDDEN, INNER)),
        ):
            yield f"blk.{layer}.{name}.weight", shape


def _read(path: Path) -> tuple[float, float]:
    """Return the seconds of reading all tensors, and of building the model."""
    source = find_model(str(path))
    placement = WeightPlacement.choose(torch.device("cpu"), "auto")
    begin = time.perf_counter()
    with open_checkpoint(source, progress=False) as checkpoint:
        checkpoint.rounded_to = placement.read_dtype
        for name in checkpoint.names():
            checkpoint.get(name)
    read = time.perf_counter() - begin
    begin = time.perf_counter()
    with open_checkpoint(source, progress=False) as checkpoint:
        checkpoint.rounded_to = placement.read_dtype
        build_model(checkpoint, load_config(source), placement)
    return read, time.perf_counter() - begin


if __name__ == "__main__":
    main()
