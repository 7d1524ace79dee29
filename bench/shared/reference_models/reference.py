"""transformers' side of the comparison: random models, saved in every form, and their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from shared.reference_models.variants import POSITIONS, ModelVariant

VOCAB = 257


def settings_of(case: ModelVariant) -> dict[str, Any]:
    """Return the entries of the variant's config class."""
    settings: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 6, "hidden_size": 96,
                "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1,
                "eos_token_id": 2}  # fmt: skip
    if case.family == "opt":
        settings |= {"ffn_dim": 176, "word_embed_proj_dim": None, "init_std": 0.08, "dropout": 0.0}
    else:
        settings |= {"intermediate_size": 176, "num_key_value_heads": 3, "initializer_range": 0.08}
    settings |= case.settings
    if case.family == "opt" and settings["word_embed_proj_dim"] is None:
        settings["word_embed_proj_dim"] = settings["hidden_size"]
    if case.family == "gemma":
        settings.setdefault("head_dim", 16)
    return settings


def divides(case: ModelVariant, ranks: int) -> bool:
    """Return whether the variant can be divided among so many ranks."""
    settings = settings_of(case)
    channels = settings["ffn_dim" if case.family == "opt" else "intermediate_size"]
    return settings["num_attention_heads"] % ranks == 0 and channels % ranks == 0


def reference_model(case: ModelVariant) -> torch.nn.Module:
    """Return a random transformers model whose weights are large enough for varied logits."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.family, **settings_of(case))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # biases and norms start at 0 and 1, which would leave them untested
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save(model: torch.nn.Module, folder: Path, case: ModelVariant) -> Path:
    """Write the model in the variant's form, and return the path to load it from."""
    if case.form == "gguf":
        from shared.reference_models.gguf_writer import write_gguf

        write_gguf(model, folder / "model.gguf")
        return folder / "model.gguf"
    model.save_pretrained(folder, max_shard_size="200KB" if case.form == "sharded" else "5GB")
    if case.form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    if case.edits:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | case.edits))
    return folder


@torch.inference_mode()
def choices_along(model: torch.nn.Module, prompt: list[int], output: list[int]) -> list[int]:
    """Return transformers' greedy choice at each place of an output, all in one forward pass.

    They equal the output if and only if transformers, token after token, would write it: so long as
    all tokens before are its own, so is its choice.
    """
    logits = model(torch.tensor([[*prompt, *output[:-1]]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 :].argmax(-1).tolist()
