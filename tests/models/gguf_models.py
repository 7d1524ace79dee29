"""What the tests of GGUF files share: small random models of transformers, and their tensors."""

from __future__ import annotations

from typing import Any

import torch

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "granite": "Granite",
    "smollm3": "SmolLM3",
    "gemma": "Gemma",
}
HEADS, KV_HEADS, VOCAB = 6, 3, 130
NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def tiny_model(family: str = "llama", **settings: Any) -> Any:
    """Return a random model whose biases and norms differ from 0 and 1 too."""
    import transformers

    name = CLASSES[family]
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a file of this model has: a tied head is not one of them."""
    tied = model.config.tie_word_embeddings
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
