"""`GGUFCheckpoint`: the tensors of a model in GGUF form, by their Hugging Face names."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from minserve.errors import UnsupportedModelError
from minserve.models.gguf_files.gguf_model import GGUFModel
from minserve.models.tensor_part import TensorPart
from minserve.models.weights.checkpoint import Checkpoint, TensorHeader

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_SEPARATE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_EVERY_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
}
# What a layer may have in each architecture; and which of these may have biases.
_LAYER_NAMES = {
    **dict.fromkeys(("llama", "granite", "smollm3", "qwen2", "gemma"), _EVERY_LAYER | _SEPARATE),
    "qwen3": _EVERY_LAYER | _SEPARATE | _HEAD_NORMS,
    "phi3": _EVERY_LAYER | _FUSED,
}
_QKV = ("attn_q", "attn_k", "attn_v")
_ATTENTION = (*_QKV, "attn_output")
_BIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "granite", "smollm3"), (*_ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
    ),
    **dict.fromkeys(("qwen3", "gemma"), _ATTENTION),
    "qwen2": _QKV,
    "phi3": (),
}
# These are settings of RoPE (gguf_rope.py) or, of old files, its frequencies; no weights.
_ROPE = re.compile(r"rope_freqs|rope_factors_(long|short)|blk\.\d+\.attn_rot_embd")
# Architectures whose converter puts the rows of q and k into GGUF's order.
_PERMUTED = ("llama", "granite", "smollm3")


class GGUFCheckpoint(Checkpoint):
    """A GGUF model's tensors as transformers has them: names, rows in their order, values.

    Raises:
        UnsupportedModelError: if there is a tensor that minserve does not know, for the model
            would give something else without it.
    """

    def __init__(self, file: Path, *, progress: bool = True) -> None:
        self._gguf = gguf = GGUFModel(file)
        heads, kv_heads = gguf.head_counts()
        permuted = gguf.architecture in _PERMUTED
        self._heads = {"attn_q": heads, "attn_k": kv_heads} if permuted else {}
        self._origin = {}
        for origin in gguf.tensors:
            if not _ROPE.fullmatch(origin.rpartition(".")[0]):
                self._origin[_name_from_gguf(origin, gguf)] = origin
        files = {name: gguf.file_of(origin) for name, origin in self._origin.items()}
        super().__init__(gguf.path, files, progress=progress)

    def _header(self, stored: str, file: Path) -> TensorHeader:
        from gguf.constants import GGMLQuantizationType

        entry = self._gguf.tensor(self._origin[stored])
        return TensorHeader(entry.shape, GGMLQuantizationType(entry.type).name)

    def _read(self, stored: str, file: Path) -> torch.Tensor:
        origin = self._origin[stored]
        tensor = self._gguf.read(origin, self.rounded_to)
        if self._gguf.architecture == "gemma" and origin.endswith("norm.weight"):
            return tensor - 1.0  # the converter adds the 1 that the model would add
        heads = self._heads.get(origin.split(".")[-2])
        if heads is None or tensor.shape[0] % (2 * heads):
            return tensor  # not permuted, or of a wrong shape that `get` will report
        return _unpermute(tensor, heads)

    def _read_part(self, stored: str, file: Path, part: TensorPart) -> torch.Tensor:
        return part.copy(self._read(stored, file))


def _name_from_gguf(name: str, gguf: GGUFModel) -> str:
    """Return the Hugging Face name of a tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem in _NAMES and suffix == "weight":
        return f"{_NAMES[stem]}.weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    layer, part = match.groups() if match else ("", "")
    known = _LAYER_NAMES[gguf.architecture].get(part)
    if known and (suffix == "weight" or (suffix == "bias" and part in _BIASES[gguf.architecture])):
        return f"model.layers.{layer}.{known}.{suffix}"
    raise UnsupportedModelError(
        f"{gguf.file_of(name)}: tensor {name!r} is not a part of a {gguf.architecture} model that "
        "minserve knows"
    )


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a q or k projection back from GGUF's order into Hugging Face's order.

    GGUF rotates neighbouring rows (0, 1), (2, 3), ..; Hugging Face rotates row i of a head
    with row i + head_dim / 2. Input and output are ``[heads * head_dim, ...]``.
    """
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
