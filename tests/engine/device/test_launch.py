"""What is queued for a device must not wait for it: checked on a device without any values.

Tensors on torch's ``meta`` device have shapes and no values, so that whatever looks at one
fails. Values that come from the host must come in queued copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drafted_batches import batch_of_three, mixed_batch, seq_with
from padded_backend import Rerun
from sampling_reference import SETTINGS, VOCAB, make_seq, random_logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minserve import Engine, SamplingParams
from minserve.engine.batch import Scheduled
from minserve.engine.device import transfers
from minserve.engine.device.cuda_graphs import DecodeGraphs, GraphLimits
from minserve.engine.device.runner import InFlightBatch, ModelRunner
from minserve.engine.sampling.rehearsal import rehearse
from minserve.engine.sampling.rows import SamplingRow
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.proposal import Proposal
from minserve.kernels.attention import AttentionBackend, AttentionMetadata, LayerKV
from minserve.models.finding.source import find_model, load_config
from minserve.models.layers import WeightFormat, WeightPlacement
from minserve.models.registry import build_model
from minserve.models.weights.loader import open_checkpoint

SAMPLER = Sampler()
CPU, META = torch.device("cpu"), torch.device("meta")


class QueuedCopiesOnly(TorchDispatchMode):
    """Fails where the host would wait until its values are on the device.

    Numbers (tensors without dimensions) go along with whatever is queued.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, first = func.overloadpacket.__name__, args[0] if args else None
        if name == "_to_copy" and first.device == CPU and not kwargs.get("non_blocking"):
            assert kwargs.get("device", CPU) == CPU, "a copy to a device that is waited for"
        if name == "copy_" and args[1].device == CPU != first.device:
            assert args[2:] == (True,), "a copy to a device that is waited for"
            return func(*args, **kwargs)
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dim() > 0]
        assert len({x.device for x in inputs}) < 2, f"{name} of tensors on host and device"
        return func(*args, **kwargs)


def host_tensor(*args: Any, make: Callable = torch.tensor, **more: Any) -> Tensor:
    assert more.get("device", CPU) == CPU, "Python numbers on a device are waited for"
    return make(*args, **more)


class NoCopy:
    """In place of the copy to the host, which is queued, but which no values can be copied by."""

    def __init__(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.device == META
            assert tensor.dtype in (torch.int64, torch.float64)
        self.tensors = tensors


@contextmanager
def nothing_waits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, QueuedCopiesOnly():
        patch.setattr(transfers, "HostCopy", NoCopy)
        patch.setattr(torch, "tensor", host_tensor)
        yield


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Take the way of a device with tensors that have values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers, "runs_behind", lambda _: True)
        yield


def moved(proposals: list[Proposal | None], device: torch.device) -> list[Proposal | None]:
    return [
        Proposal(one.token_ids, tuple(q.to(device) for q in one.probabilities))
        if one is not None and one.probabilities
        else one
        for one in proposals
    ]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.add(torch.tensor([1.0], device=META)),
        lambda x: x.add(torch.tensor([1.0]).to(META)),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.copy_(torch.zeros(3)),
    ],
)
def test_the_check_finds_what_waits(look: Callable[[Tensor], Any]) -> None:
    # The check's own word, or that of the device, which has no value to be looked at.
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), nothing_waits():
        look(torch.empty(3, device=META))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("logprobs", [None, 2])
def test_sampling_is_launched_without_waiting(settings: dict, logprobs: int | None) -> None:
    seqs = [
        make_seq(output=[4, 5], stop=[7], logprobs=logprobs, seed=i, **settings) for i in (1, 2)
    ]
    seqs.append(make_seq(temperature=0.0))
    with nothing_waits():
        SAMPLER.launch(torch.empty(3, VOCAB, device=META), seqs, [None] * 3)


@pytest.mark.parametrize("kind", ["plain", "drawn", "by chance"])
def test_verification_is_launched_without_waiting(kind: str) -> None:
    _, seqs, proposals = batch_of_three(kind)
    proposals = moved(proposals, META)
    with nothing_waits():
        SAMPLER.launch(torch.empty(12, VOCAB, device=META), seqs, proposals)


def test_a_mixed_batch_is_launched_without_waiting() -> None:
    logits, seqs, proposals = mixed_batch()
    whole, proposals = torch.cat(logits).to(META), moved(proposals, META)
    with nothing_waits():
        SAMPLER.launch(whole, seqs, proposals)


class NoAttention(AttentionBackend):
    """Queries come out as they went in."""

    def allocate(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerKV:
        empty = torch.empty(num_blocks, block_size, self.num_kv_heads, 1, device=device)
        return LayerKV(empty, empty)

    def prepare(self, metadata: AttentionMetadata) -> None:
        inputs = (metadata.slot_mapping, metadata.block_tables, metadata.starts, metadata.lengths)
        assert all(x.device == META for x in inputs)

    def write_kv(self, *_: Any) -> None:
        pass

    def forward(self, query: Tensor, kv: LayerKV, metadata: AttentionMetadata) -> Tensor:
        return query.flatten(1)


def runner_on_meta(folder: Path) -> ModelRunner:
    source = find_model(str(folder))
    placement = WeightPlacement(META, torch.float32, torch.float32, WeightFormat.DENSE)
    with open_checkpoint(source) as checkpoint:
        model = build_model(checkpoint, load_config(source), placement)
    shape = model.shape
    backend = NoAttention(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale)
    kv = [backend.allocate(40, 16, torch.float32, META)] * shape.num_layers
    return ModelRunner(model, backend, kv, 16, META)


@pytest.mark.parametrize("with_graphs", [False, True], ids=["passes", "graphs"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_batches_are_launched_without_waiting(
    family: str, with_graphs: bool, request: pytest.FixtureRequest
) -> None:
    runner = runner_on_meta(request.getfixturevalue(f"tiny_{family}_dir"))
    decode, verified, prefill = (make_seq(prompt=range(40), output=[1], seed=i) for i in range(3))
    for seq in (decode, verified):
        seq.num_computed_tokens = 40
    for seq in (decode, verified, prefill):
        seq.block_table = [3, 4, 5]
    decodes = [Scheduled(decode, 1), Scheduled(verified, 1, Proposal((7, 8)))]
    with nothing_waits():
        if with_graphs:
            runner.graphs = DecodeGraphs(runner, Rerun(), GraphLimits(4, 8, 100, (1, 4)))
        for batch in (decodes[:1], decodes, [*decodes, Scheduled(prefill, 20)]):
            assert isinstance(runner.launch(batch), InFlightBatch)


@pytest.mark.parametrize("with_graphs", [False, True], ids=["passes", "graphs"])
def test_a_batch_behind_another_one_is_launched_without_waiting(
    tiny_llama_dir: Path, with_graphs: bool
) -> None:
    runner = runner_on_meta(tiny_llama_dir)
    decode, prefill = (make_seq(prompt=range(40), output=[1], seed=i) for i in range(2))
    decode.num_computed_tokens = 40
    for seq in (decode, prefill):
        seq.block_table = [3, 4, 5]
    with nothing_waits():
        if with_graphs:
            runner.graphs = DecodeGraphs(runner, Rerun(), GraphLimits(4, 8, 100))
        before = runner.launch([Scheduled(decode, 1), Scheduled(prefill, 41)])
        twins = [decode.ahead(1, 0.0), prefill.ahead(41, 0.0)]
        behind = runner.follow([Scheduled(twin, 1) for twin in twins], before)
        decode.num_computed_tokens += 1
        decode.token_ids.append(7)
        # The other one has ended meanwhile.
        behind.sample([Scheduled(decode, 1)])
        chunk = make_seq(prompt=range(40))
        chunk.block_table = [6, 7, 8]
        runner.follow([Scheduled(decode.ahead(1, 0.0), 1), Scheduled(chunk, 20)], behind)


def test_results_on_the_way_of_a_device_are_those_of_the_host() -> None:
    logits, seqs, proposals = mixed_batch()
    whole = torch.cat(logits)
    expected = SAMPLER.verify(whole, seqs, proposals)
    with as_on_a_device():
        assert SAMPLER.verify(whole, seqs, proposals) == expected
    hurt = whole.clone()
    hurt[::7, 3] = torch.nan
    hurt[::11] = -torch.inf
    expected = SAMPLER.verify(hurt, seqs, proposals)
    with as_on_a_device():
        assert list(map(str, SAMPLER.verify(hurt, seqs, proposals))) == list(map(str, expected))


def test_ties_at_the_border_of_top_p_are_cut_alike() -> None:
    logits = random_logits(64, seed=3).round()
    seqs = [make_seq(top_p=0.3 + 0.01 * i, seed=i) for i in range(64)]
    expected = SAMPLER.sample(logits, seqs)
    with as_on_a_device():
        assert SAMPLER.sample(logits, seqs) == expected


def test_drafts_on_the_way_of_a_device_are_those_of_the_host() -> None:
    rows = [
        SamplingRow(seq_with([7], seed=i, **settings), (8,)) for i, settings in enumerate(SETTINGS)
    ]
    logits = random_logits(len(rows), seed=4)
    expected = SAMPLER.draft(logits, rows)
    with as_on_a_device():
        got = SAMPLER.draft(logits, rows)
    for one, other in zip(got, expected, strict=True):
        assert one.token_id == other.token_id
        assert (one.probabilities is None) == (other.probabilities is None)
        if one.probabilities is not None:
            assert torch.equal(one.probabilities, other.probabilities)


def test_an_engine_on_the_way_of_a_device_says_the_same(tiny_llama_dir: Path) -> None:
    engine = Engine(str(tiny_llama_dir), device="cpu", dtype="float32", threads=1, num_blocks=200,
                    seed=3, token_budget=64, max_num_seqs=16)  # fmt: skip
    prompts = ["The quick brown fox", "def add(a, b):", "x", "Grüße aus Köln " * 8]
    common = {"max_tokens": 8, "prompt_logprobs": 1, "logprobs": 2, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0.0, **common),
        SamplingParams(top_p=0.8, seed=1, **common),
        SamplingParams(top_k=9, repetition_penalty=1.3, seed=2, **common),
        SamplingParams(temperature=0.7, min_p=0.02, seed=3, **common),
    ]

    def outputs() -> list[tuple]:
        return [
            (result.outputs[0].token_ids, result.outputs[0].logprobs, result.prompt_logprobs)
            for result in engine.generate(prompts, params)
        ]

    expected = outputs()
    with as_on_a_device():
        assert outputs() == expected


def test_results_are_of_the_moment_of_the_launch() -> None:
    logits = random_logits(2, seed=8)
    seqs = [make_seq(seed=i, logprobs=1) for i in range(2)]
    with as_on_a_device():
        expected = SAMPLER.sample(logits, seqs)
        pending = SAMPLER.launch(logits, seqs, [None, None])
        logits.zero_()  # as the next replay of a graph overwrites what it gave
        assert [one.tokens[0] for one in pending.results()] == expected


def test_a_host_copy_keeps_shapes_types_and_values() -> None:
    tensors = (
        torch.arange(6).view(2, 3),
        torch.tensor([0.1, -torch.inf, 1e-300], dtype=torch.float64),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([2**62, -1]),
    )
    with as_on_a_device():
        copies = transfers.HostCopy(*tensors).wait()
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr() or not len(tensor)


def test_tokens_are_the_same_where_truncation_is_a_kernel() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, seqs, proposals = mixed_batch()
    whole, proposals = torch.cat(logits).to(device), moved(proposals, device)
    expected = SAMPLER.verify(whole, seqs, proposals)
    assert Sampler(fused=True).verify(whole, seqs, proposals) == expected
    rows = [
        SamplingRow(seq_with([7], seed=i, **settings), (8,)) for i, settings in enumerate(SETTINGS)
    ]
    logits = random_logits(len(rows), seed=4).to(device)
    drafts = zip(SAMPLER.draft(logits, rows), Sampler(fused=True).draft(logits, rows), strict=True)
    assert all(one.token_id == other.token_id for one, other in drafts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_cuda_finds_nothing_that_waits_either(fused: bool) -> None:
    sampler = Sampler(fused=fused)
    logits, seqs, proposals = mixed_batch()
    rehearse(sampler, torch.zeros(2, VOCAB, device="cuda"), 1, 1, by_chance=True)
    whole = torch.cat(logits)
    expected = SAMPLER.verify(whole, seqs, proposals)
    whole, proposals = whole.cuda(), moved(proposals, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = sampler.launch(whole, seqs, proposals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chosen = [[token.token_id for token in one.tokens] for one in pending.results()]
    assert chosen == [[token.token_id for token in one.tokens] for one in expected]
