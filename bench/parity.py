"""Compare every Llama and OPT variant with transformers: logits and greedy tokens.

For each case a random model is saved in Hugging Face form, loaded by both, and run on prompts of
odd lengths: transformers runs each prompt whole, minserve runs mixed batches of prefill chunks and
decodes over a paged cache with scattered blocks. The last line is JSON.

    python bench/parity.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.device.kv_cache import allocate_kv_cache
from minserve.engine.device.runner import ModelRunner
from minserve.kernels.attention import AttentionMetadata, make_attention_backend
from minserve.models.base import CausalLM
from minserve.models.layers import WeightPlacement
from minserve.models.loader import open_checkpoint
from minserve.models.registry import build_model
from minserve.models.source import find_model, load_config
from minserve.planner.policies.registry import make_planner
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

VOCAB = 257
PROMPT_LENGTHS = (1, 5, 37, 123)
GREEDY_TOKENS = 64
TOLERANCE = 1e-4
BLOCK_SIZE = 16


@dataclass(frozen=True)
class ModelVariant:
    """A model variant: family, settings of transformers' config class, and file format."""

    name: str
    family: str
    settings: dict = field(default_factory=dict)
    form: str = "safetensors"


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_SCALING = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CASES = [
    ModelVariant("llama, one KV head per head", "llama", {"num_key_value_heads": 6}),
    ModelVariant("llama, GQA 2", "llama", {"num_key_value_heads": 3}),
    ModelVariant("llama, GQA 3, tied", "llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ModelVariant("llama, one KV head", "llama", {"num_key_value_heads": 1}),
    ModelVariant("llama, attention bias", "llama", {"attention_bias": True}),
    ModelVariant("llama, MLP bias", "llama", {"mlp_bias": True}),
    ModelVariant("llama, both biases, sharded", "llama", {"attention_bias": True, "mlp_bias": True}, "sharded"),
    ModelVariant("llama, wide heads", "llama", {"head_dim": 32}),
    ModelVariant("llama, odd widths", "llama", {"hidden_size": 60, "intermediate_size": 101, "head_dim": 10}),
    ModelVariant("llama, RoPE linear", "llama", {"rope_parameters": LINEAR_SCALING}),
    ModelVariant("llama, RoPE llama3", "llama", {"rope_parameters": LLAMA3_SCALING}),
    ModelVariant("llama, RoPE theta 1e6", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ModelVariant("llama, pytorch_model.bin", "llama", {}, "bin"),
    ModelVariant("opt, as 125m", "opt"),
    ModelVariant("opt, as 350m", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    ModelVariant("opt, post-norm", "opt", {"do_layer_norm_before": False}),
    ModelVariant("opt, projected embedding, pre-norm", "opt", {"word_embed_proj_dim": 40}),
    ModelVariant("opt, as 2.7b (head_dim 80)", "opt", {"hidden_size": 160, "num_attention_heads": 2}),
    ModelVariant("opt, as 6.7b and 30b (head_dim 128), sharded", "opt", {"hidden_size": 256, "num_attention_heads": 2}, "sharded"),
    ModelVariant("opt, no biases", "opt", {"enable_bias": False}),
    ModelVariant("opt, plain layer norms", "opt", {"layer_norm_elementwise_affine": False}),
    ModelVariant("opt, no final norm", "opt", {"_remove_final_layer_norm": True}),
    ModelVariant("opt, untied head", "opt", {"tie_word_embeddings": False}),
    ModelVariant("opt, GELU", "opt", {"activation_function": "gelu"}),
    ModelVariant("opt, pytorch_model.bin", "opt", {}, "bin"),
]  # fmt: skip


def reference_model(case: ModelVariant) -> torch.nn.Module:
    """Return a random transformers model whose weights are large enough for varied logits."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    common = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 6,
              "max_position_embeddings": 256, "attn_implementation": "eager"}  # fmt: skip
    torch.manual_seed(0)
    if case.family == "llama":
        settings = common | {"hidden_size": 96, "intermediate_size": 176, "num_key_value_heads": 3,
                             "initializer_range": 0.08} | case.settings  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**settings))
    else:
        settings = common | {"hidden_size": 96, "ffn_dim": 176, "word_embed_proj_dim": None,
                             "init_std": 0.08, "dropout": 0.0} | case.settings  # fmt: skip
        if settings["word_embed_proj_dim"] is None:
            settings["word_embed_proj_dim"] = settings["hidden_size"]
        model = OPTForCausalLM(OPTConfig(**settings))
    with torch.no_grad():  # biases and norms start at 0 and 1, which would leave them untested
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save(model: torch.nn.Module, folder: Path, form: str) -> None:
    """Write the model as safetensors (whole or sharded) or as pytorch_model.bin."""
    model.save_pretrained(folder, max_shard_size="200KB" if form == "sharded" else "5GB")
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def load(folder: Path, dtype: str = "float32") -> tuple[CausalLM, WeightPlacement]:
    """Load the saved model in minserve, on the CPU."""
    source = find_model(str(folder))
    placement = WeightPlacement.choose(torch.device("cpu"), dtype)
    with open_checkpoint(source) as checkpoint:
        return build_model(checkpoint, load_config(source), placement), placement


def make_runner(model: CausalLM, placement: WeightPlacement, num_blocks: int = 64) -> ModelRunner:
    """Return a runner with the torch backend and a small cache."""
    s = model.shape
    backend = make_attention_backend("torch", s.num_heads, s.num_kv_heads, s.head_dim, s.scale)
    kv = allocate_kv_cache(
        backend, s.num_layers, num_blocks, BLOCK_SIZE, placement.dtype, placement.device
    )
    return ModelRunner(model, backend, kv, BLOCK_SIZE, placement.device)


def prompts(seed: int = 1) -> list[list[int]]:
    """Return one random prompt per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


@torch.inference_mode()
def chunked_logits(
    runner: ModelRunner, token_lists: list[list[int]], chunk: int
) -> list[torch.Tensor]:
    """Return the logits of every position, from mixed batches of chunks over scattered blocks."""
    num_blocks = runner.kv[0].key.shape[0]
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).tolist()
    tables = []
    for tokens in token_lists:
        need = -(-len(tokens) // BLOCK_SIZE)
        tables.append([order.pop() for _ in range(need)])
    done = [0] * len(token_lists)
    rows: list[list[torch.Tensor]] = [[] for _ in token_lists]
    while any(d < len(t) for d, t in zip(done, token_lists, strict=True)):
        live = [i for i, tokens in enumerate(token_lists) if done[i] < len(tokens)]
        ends = {i: min(done[i] + chunk, len(token_lists[i])) for i in live}
        # A chunk of one token is a decode to the backend; decodes come first.
        live.sort(key=lambda i: ends[i] - done[i] > 1)
        logits = _forward(runner, live, ends, done, token_lists, tables)
        start = 0
        for i in live:
            count = ends[i] - done[i]
            rows[i].append(logits[start : start + count])
            start, done[i] = start + count, ends[i]
    return [torch.cat(r) for r in rows]


def _forward(
    runner: ModelRunner,
    live: list[int],
    ends: dict[int, int],
    done: list[int],
    token_lists: list[list[int]],
    tables: list[list[int]],
) -> torch.Tensor:
    spans = [(i, p) for i in live for p in range(done[i], ends[i])]
    starts = [0]
    for i in live:
        starts.append(starts[-1] + ends[i] - done[i])
    widest = max(len(tables[i]) for i in live)
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=[ends[i] for i in live],
        block_tables=torch.tensor([tables[i] + [0] * (widest - len(tables[i])) for i in live]),
        slot_mapping=torch.tensor(
            [tables[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for i, p in spans]
        ),
        block_size=BLOCK_SIZE,
        num_decodes=sum(ends[i] - done[i] == 1 for i in live),
    )
    runner.backend.prepare(metadata)
    token_ids = torch.tensor([token_lists[i][p] for i, p in spans])
    positions = torch.tensor([p for _, p in spans])
    hidden = runner.model.forward(token_ids, positions, runner.kv, runner.backend, metadata)
    return runner.model.logits(hidden)


def greedy(runner: ModelRunner, token_lists: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Return greedy continuations from the engine core, with all prompts in one batch."""
    pool = BlockPool(runner.kv[0].key.shape[0], BLOCK_SIZE)
    core = EngineCore(runner, pool, make_planner("sarathi"), token_budget=50, max_num_seqs=8,
                      max_model_len=pool.num_blocks * pool.block_size, clock=time.monotonic)  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    sequences = [
        Sequence(Request(request_id=str(i), prompt_token_ids=tuple(t), params=params, seed=0, arrival_s=float(i)))
        for i, t in enumerate(token_lists)
    ]  # fmt: skip
    for sequence in sequences:
        core.add(sequence, None)
    while core.has_work:
        core.step()
    return [s.output_token_ids for s in sequences]


@torch.inference_mode()
def reference_greedy(model: torch.nn.Module, tokens: list[int], num_tokens: int) -> list[int]:
    """Return transformers' greedy continuation, without its `generate` and what that adds."""
    cache, step, out = None, torch.tensor([tokens]), []
    for _ in range(num_tokens):
        result = model(step, past_key_values=cache, use_cache=True)
        cache, token = result.past_key_values, result.logits[0, -1].argmax().item()
        out.append(token)
        step = torch.tensor([[token]])
    return out


def check(case: ModelVariant) -> Iterator[str]:
    """Run one case, and yield a line for every mismatch."""
    reference = reference_model(case)
    with tempfile.TemporaryDirectory() as folder:
        save(reference, Path(folder), case.form)
        runner = make_runner(*load(Path(folder)))
    token_lists = prompts()
    with torch.inference_mode():
        expected = [reference(torch.tensor([t])).logits[0] for t in token_lists]
    for chunk in (256, 17, 1):
        for tokens, want, got in zip(
            token_lists, expected, chunked_logits(runner, token_lists, chunk), strict=True
        ):
            error = (want - got).abs().max().item()
            if not error <= TOLERANCE:
                yield f"{case.name}: {len(tokens)} tokens in chunks of {chunk}: logits differ by {error:.2e}"
    for tokens, got in zip(token_lists, greedy(runner, token_lists, GREEDY_TOKENS), strict=True):
        if got != reference_greedy(reference, tokens, GREEDY_TOKENS):
            yield f"{case.name}: greedy continuation of {len(tokens)} tokens differs"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    mismatches = []
    for case in tqdm(CASES, desc="Parity", unit="case"):
        mismatches += check(case)
    for line in mismatches:
        print(line)
    print(json.dumps({"cases": len(CASES), "mismatches": len(mismatches)}))


if __name__ == "__main__":
    main()
