"""`GGUFCheckpoint`: the tensors of a GGUF file by their Hugging Face names."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from minserve.models.checkpoint import Checkpoint, TensorHeader
from minserve.models.gguf_file import GGUFFile

_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint(Checkpoint):
    """A llama GGUF file under Hugging Face names, its q and k rows in Hugging Face order."""

    def __init__(self, file: Path, *, progress: bool = True) -> None:
        self._gguf = GGUFFile(file)
        heads, kv_heads = self._gguf.head_counts()
        self._heads = {"attn_q": heads, "attn_k": kv_heads}
        self._origin = {
            name: gguf for gguf in self._gguf.tensors if (name := _name_from_gguf(gguf))
        }
        super().__init__(file, dict.fromkeys(self._origin, file), progress=progress)

    def _header(self, stored: str, file: Path) -> TensorHeader:
        from gguf.constants import GGMLQuantizationType

        entry = self._gguf.tensor(self._origin[stored])
        return TensorHeader(entry.shape, GGMLQuantizationType(entry.type).name)

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        origin = self._origin[stored]
        tensor = self._gguf.read(origin)
        heads = self._heads.get(origin.split(".")[-2])
        if heads is None or tensor.shape[0] % (2 * heads):
            return tensor  # not permuted, or of a wrong shape that `get` will report
        return _unpermute(tensor, heads)


def _name_from_gguf(name: str) -> str | None:
    """Return the Hugging Face name of a llama tensor; ``None`` for a tensor that is no weight."""
    stem, _, suffix = name.rpartition(".")
    if stem in _GGUF_NAMES:
        return f"{_GGUF_NAMES[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _GGUF_LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_GGUF_LAYER_NAMES[match[2]]}.{suffix}"


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a q or k projection back from GGUF's order into Hugging Face's order.

    GGUF rotates neighbouring rows (0, 1), (2, 3), ..; Hugging Face rotates row i of a head
    with row i + head_dim / 2. Input and output are ``[heads * head_dim, ...]``.
    """
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
