"""The embedded model against transformers: greedy text, and log probabilities in each dtype."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pydoc_data.topics import topics

import pytest
import torch

from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightPlacement
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint
from parts.parity.passes import chunked_logits, make_runner

TEXT = "The capital of France is Paris, and the capital of Germany is Berlin. Rivers flow to the"


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """transformers' Llama in float32 with the weights of the GGUF file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = find_model("smollm2")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**asdict(load_config(source))))
    with open_checkpoint(source, progress=False) as checkpoint:
        state = {name: checkpoint.get(name) for name in checkpoint.names()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    return Tokenizer.load(find_model("smollm2")).encode(TEXT)


@torch.inference_mode()
def reference_logprobs(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Of all tokens at once; but in bfloat16, whose matmul of many rows takes minutes on some CPUs,
    token by token.
    """
    if model.dtype is torch.float32:
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].log_softmax(-1)
    rows, cache = [], None
    for token in token_ids:
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows).log_softmax(-1)


def our_logprobs(
    dtype: str, token_ids: list[int], chunk: int = 1, twice: bool = False
) -> torch.Tensor:
    """Computed so many tokens at a time, with weights in two forms where asked for."""
    source = find_model("smollm2")
    placement = WeightPlacement.choose(torch.device("cpu"), dtype, twice=twice)
    with open_checkpoint(source, progress=False) as checkpoint:
        model = build_model(checkpoint, load_config(source), placement)
    runner = make_runner(model, placement)
    (logits,) = chunked_logits(runner, [token_ids], chunk)
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("float16", 5e-2)])
def test_logprobs_are_those_of_transformers(
    reference: torch.nn.Module, token_ids: list[int], dtype: str, bound: float
) -> None:
    want, got = reference_logprobs(reference, token_ids), our_logprobs(dtype, token_ids)
    likely = want > -12  # where the probability is beyond mere noise
    assert (want - got)[likely].abs().max() < bound
    assert want.argmax(-1).tolist() == got.argmax(-1).tolist()


def test_bfloat16_is_no_further_from_float32_than_transformers_own(
    reference: torch.nn.Module,
) -> None:
    # Errors of a few tokens are mostly chance.
    token_ids = Tokenizer.load(find_model("smollm2")).encode(topics["class"])[:160]
    exact = reference_logprobs(reference, token_ids)
    theirs = reference_logprobs(copy.deepcopy(reference).bfloat16(), token_ids)
    likely = exact > -12
    their_error = (theirs - exact)[likely].abs()
    for chunk, twice in ((1, False), (1, True), (len(token_ids), True)):
        got = our_logprobs("bfloat16", token_ids, chunk, twice)
        our_error = (got - exact)[likely].abs()
        # A tenth more for the order of sums, which is each CPU's own.
        assert our_error.mean() < 1.1 * their_error.mean(), (chunk, twice)
        assert our_error.max() < 2 * their_error.max(), (chunk, twice)
