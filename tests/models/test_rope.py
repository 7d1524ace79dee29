"""Rotations of every kind of RoPE scaling beside transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minserve.models.config import LlamaConfig
from minserve.models.rope import RotaryEmbedding, interleave, rope_frequencies

HEAD_DIM, ORIGINAL = 16, 64
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn, all settings": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn, its own magnitude": {
        "rope_type": "yarn",
        "factor": 8.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": LONGROPE,
    "longrope, its own magnitude": {**LONGROPE, "attention_factor": 1.25},
}


@pytest.mark.parametrize("length", [ORIGINAL, 4 * ORIGINAL])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str, length: int) -> None:
    from transformers import LlamaConfig as Theirs
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 5000.0, **KINDS[kind]}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": ORIGINAL}
    theirs = Theirs(**sizes, rope_parameters=dict(rope))
    want, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, None, seq_len=length)
    ours = LlamaConfig.from_dict({**sizes, "rope_parameters": rope})
    got, scale = rope_frequencies(HEAD_DIM, ours.rope_parameters, length, ORIGINAL)
    assert torch.allclose(got, want, rtol=1e-6, atol=0)
    assert scale == pytest.approx(magnitude, rel=1e-6)


def test_a_part_of_each_head_stays_as_it_is() -> None:
    """Rotated as pairs side by side, scores are those of transformers' halves."""
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75}
    torch.manual_seed(0)
    query, key = torch.randn(2, 5, 16)
    embedding = RotaryEmbedding(16, 5, rope, torch.device("cpu"), 5)
    turns = embedding.rotations(torch.arange(5)).squeeze(1)
    assert torch.equal(turns[:, 6:], torch.ones(5, 2, dtype=torch.complex64))

    def turned(x: torch.Tensor) -> torch.Tensor:
        paired = torch.stack([interleave(row, 16, 12) for row in x])
        return torch.view_as_real(torch.view_as_complex(paired.view(5, 8, 2)) * turns).flatten(1)

    angles = torch.outer(torch.arange(5.0), 100.0 ** -(torch.arange(0, 12, 2) / 12))
    cos, sin = (f(torch.cat((angles, angles), 1))[None] for f in (torch.cos, torch.sin))
    want_q, want_k = apply_rotary_pos_emb(query[None, None], key[None, None], cos, sin)
    want = want_q[0, 0] @ want_k[0, 0].T
    assert torch.allclose(turned(query) @ turned(key).T, want, atol=1e-5)


def test_a_magnitude_scales_rotated_dimensions_alone() -> None:
    rope = {**LONGROPE, "rope_theta": 5000.0, "attention_factor": 1.25,
            "short_factor": [1.0] * 6, "long_factor": [1.0] * 6,
            "partial_rotary_factor": 0.75}  # fmt: skip
    turns = RotaryEmbedding(16, 5, rope, torch.device("cpu"), 5).rotations(torch.arange(5))
    assert torch.allclose(turns.abs()[..., :6], torch.tensor(1.25))
    assert torch.equal(turns.abs()[..., 6:], torch.ones(5, 1, 2))
