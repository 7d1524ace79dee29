"""A model divided among ranks is the model: its logits, its greedy tokens, a share of its memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import FunctionType, ModuleType

import parity
import pytest
import torch

from minserve.errors import ConfigError
from minserve.models.base import CausalLM
from minserve.models.config import LlamaConfig, ModelConfig, OPTConfig
from minserve.models.deterministic_layers import DeterministicPlacement
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightFormat, WeightPlacement
from minserve.models.ranks import ALONE, Ranks, check_size
from minserve.models.registry import build_model
from minserve.models.tensor_part import TensorPart
from minserve.models.weights.loader import open_checkpoint
from parts.parity.passes import chunked_logits, greedy, load, load_divided, make_runner
from parts.parity.rank_threads import RankThreads
from shared.reference_models.reference import reference_model, save
from shared.reference_models.variants import BIAS, MLP_BIAS, MULTIPLIERS, TIED, ModelVariant

CPU = torch.device("cpu")
GREEDY_TOKENS = 8
# One of all that is divided in its own way; bench/parity.py --tensor-parallel has the others.
IN_TWO = {
    *("llama, GQA 3, tied", "llama, one KV head", "llama, both biases, sharded"),
    *("llama, GQA 2, GGUF", "llama, pytorch_model.bin", "llama, said to be tied, but not"),
    *("qwen2", "qwen3, attention bias", "phi3, GQA 3, sharded", "phi3, GGUF"),
    *("phi3, part of each head rotated", "granite, tied, biases", "smollm3"),
    *("gemma, one KV head, wide", "opt, as 125m", "opt, as 350m", "opt, no biases", "opt, GELU"),
    *("opt, projected embedding, pre-norm", "opt, untied head", "opt, said to be tied, but not"),
}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
IN_FOUR = [
    ModelVariant("llama, KV heads repeated", "llama", {**EIGHT, **BIAS, **MLP_BIAS}),
    ModelVariant("llama, KV heads divided", "llama", {**EIGHT, "num_key_value_heads": 8}),
    # 5 tokens for 4 ranks: the last one has none.
    ModelVariant("qwen3, few tokens", "qwen3", {**EIGHT, **TIED, "vocab_size": 5}, lengths=(5,)),
    ModelVariant("phi3, fused", "phi3", EIGHT),
    ModelVariant("granite", "granite", {**EIGHT, **MULTIPLIERS}),
    ModelVariant("opt", "opt", {"num_attention_heads": 8}),
]


@pytest.fixture(scope="module")
def two() -> Iterator[RankThreads]:
    with RankThreads(2) as threads:
        yield threads


@pytest.fixture(scope="module")
def four() -> Iterator[RankThreads]:
    with RankThreads(4) as threads:
        yield threads


def assert_alike(case: ModelVariant, threads: RankThreads, folder: Path) -> None:
    """Compare a model on ranks with the same model alone."""
    path = save(reference_model(case), folder, case)
    prompts = [
        [t % case.settings.get("vocab_size", t + 1) for t in p]
        for p in parity.prompts(case.lengths[:3])
    ]
    whole = make_runner(*load(path, longest=case.longest))
    divided = make_runner(*load_divided(path, threads, longest=case.longest))
    pairs = zip(
        chunked_logits(whole, prompts, 17), chunked_logits(divided, prompts, 17), strict=True
    )
    assert max((want - got).abs().max().item() for want, got in pairs) < 1e-4
    if case.continues:
        assert greedy(divided, prompts, GREEDY_TOKENS) == greedy(whole, prompts, GREEDY_TOKENS)


def test_the_cases_of_two_ranks_are_there() -> None:
    assert {case.name for case in parity.CASES} >= IN_TWO


@pytest.mark.parametrize(
    "case", [c for c in parity.CASES if c.name in IN_TWO], ids=lambda c: c.name
)
def test_two_ranks_give_the_logits_and_tokens_of_one(
    case: ModelVariant, two: RankThreads, tmp_path: Path
) -> None:
    assert_alike(case, two, tmp_path)


@pytest.mark.parametrize("case", IN_FOUR, ids=lambda c: c.name)
def test_four_ranks_give_the_logits_and_tokens_of_one(
    case: ModelVariant, four: RankThreads, tmp_path: Path
) -> None:
    assert_alike(case, four, tmp_path)


FORMS_ON_A_CPU = {
    "float16 weights": WeightPlacement(CPU, torch.float32, torch.float16, WeightFormat.FBGEMM_FP16),
    "bfloat16": WeightPlacement(CPU, torch.bfloat16, torch.bfloat16, WeightFormat.DENSE),
    "two forms": WeightPlacement(CPU, torch.bfloat16, torch.bfloat16, WeightFormat.ONEDNN_AND_FP16),
    "int8": WeightPlacement(CPU, torch.bfloat16, torch.bfloat16, WeightFormat.FBGEMM_INT8),
    "deterministic": DeterministicPlacement(CPU, torch.float32, torch.float32, WeightFormat.DENSE),
}


@pytest.mark.parametrize("form", FORMS_ON_A_CPU)
def test_every_form_of_weights_is_as_exact_on_ranks_as_alone(
    form: str, two: RankThreads, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = FORMS_ON_A_CPU[form]
    if placement.has_two_forms and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU keeps one form")
    prompts = parity.prompts((3, 40))
    exact = torch.cat(chunked_logits(make_runner(*load(tiny_llama_dir)), prompts, 17))
    monkeypatch.setattr(WeightPlacement, "choose", lambda *_, **__: placement)
    for chunk in (1, 17):  # of few tokens some forms compute in float32
        alone = torch.cat(chunked_logits(make_runner(*load(tiny_llama_dir)), prompts, chunk))
        divided = make_runner(*load_divided(tiny_llama_dir, two))
        got = torch.cat(chunked_logits(divided, prompts, chunk))
        allowed = 1.25 * (alone - exact).square().mean().sqrt() + 1e-5
        assert (got - exact).square().mean().sqrt() <= allowed


def test_a_tokens_sum_does_not_depend_on_the_tokens_beside_it(four: RankThreads) -> None:
    def sums(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(64, 33, generator=torch.Generator().manual_seed(ranks.rank))
        return ranks.all_reduce(x.clone())[5:6], ranks.all_reduce(x[5:6].clone())

    found = four.on_each(sums)
    for together, alone in found:
        assert torch.equal(together, alone)
        assert torch.equal(alone, found[0][1])


# ------------------------------------------------------------------------------------ memory


class OneOf(Ranks):
    """A rank without the others, of which weights alone are wanted."""


def num_bytes(model: CausalLM) -> int:
    """Return the memory of all tensors that a model holds, without RoPE's table."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    things: list[object] = [model]
    while things:
        thing = things.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, FunctionType):
            things += [cell.cell_contents for cell in thing.__closure__ or ()]
        elif thing is not getattr(model, "rope", None):
            things += gc.get_referents(thing)
    return sum(found.values())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_each_rank_keeps_its_share_of_the_weights(family: str, size: int, tmp_path: Path) -> None:
    settings = {"num_attention_heads": 8, "vocab_size": 1024, "max_position_embeddings": 16}
    kv_heads = {} if family == "opt" else {"num_key_value_heads": 4}
    case = ModelVariant(family, family, {**settings, **kv_heads})
    source = find_model(str(save(reference_model(case), tmp_path, case)))
    placement = WeightPlacement(CPU, torch.bfloat16, torch.bfloat16, WeightFormat.DENSE)

    def built(ranks: Ranks) -> int:
        with open_checkpoint(source, progress=False) as checkpoint:
            model = build_model(checkpoint, load_config(source), placement, ranks=ranks)
        return num_bytes(model)

    whole = built(ALONE)
    for rank in range(size):
        assert built(OneOf(rank, size)) <= whole / size * 1.05


# ------------------------------------------------------------------------- what does not divide


@pytest.mark.parametrize(
    ("config", "size", "would_do"),
    [
        (
            LlamaConfig(
                hidden_size=576,
                num_attention_heads=9,
                num_key_value_heads=3,
                intermediate_size=1536,
            ),
            4,
            "1, 2, 3",
        ),
        (
            LlamaConfig(num_attention_heads=32, num_key_value_heads=8, intermediate_size=11010),
            4,
            "1, 2, 3, 5, 6",
        ),
        (OPTConfig(num_attention_heads=12, ffn_dim=3072), 16, "1, 2, 3, 4, 6, 8, 12"),
    ],
)
def test_a_model_that_does_not_divide_says_which_numbers_would_do(
    config: ModelConfig, size: int, would_do: str
) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel may be {would_do}$") as error:
        check_size(config, size)
    assert "\n" not in str(error.value)
    check_size(config, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_each_query_head_finds_its_kv_head_on_its_rank(size: int) -> None:
    for kv_heads, times in product((1, 2, 3, 4, 6, 8, 12), repeat=2):
        heads = kv_heads * times
        for rank in range(size if heads % size == 0 or size <= kv_heads else 0):
            ranks = OneOf(rank, size)
            own = ranks.queries(0, heads, kv_heads, 1).cut(torch.arange(heads)).tolist()
            own_kv = ranks.kv_heads(heads, kv_heads, 1).cut(torch.arange(kv_heads)).tolist()
            assert len(own_kv) == ranks.num_kv_heads(heads, kv_heads)
            group = len(own) // len(own_kv)  # query head i attends to KV head i // group
            assert [own_kv[i // group] for i in range(len(own))] == [h // times for h in own]


def test_parts_of_fused_tensors_are_cut_at_once() -> None:
    parts = [TensorPart(0, ((2, 2),)), TensorPart(0, ((0, 1), (0, 1)))]
    fused = TensorPart.of_fused(parts, [4, 2])
    assert fused.runs == ((2, 3), (4, 1))
    assert fused.cut(torch.arange(6)).tolist() == [2, 3, 4, 4]
    assert TensorPart.of_fused(
        [TensorPart(0, ((0, 4),)), TensorPart(0, ((0, 2),))], [4, 2]
    ).is_whole((6, 9))
