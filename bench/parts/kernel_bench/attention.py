"""Attention problems of `kernel_bench.py`: decodes and prefill chunks, with their contestants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from minserve.kernels.attention import (
    AttentionBackend,
    AttentionMetadata,
    LayerKV,
    make_attention_backend,
)
from minserve.kernels.kv_quantization import KV_FORMS, head_bytes, quantize, raw
from shared.kernel_cases import OURS, Contestant, Heads, KernelSetting, Problem, Scale

BLOCK_SIZE = 32  # the engine's default
FLASH_ATTN_BLOCK_SIZE = 256  # the only size that flash-attn takes

# Models whose heads differ (Llama-2-7B and -13B have the heads of OPT-6.7B and -13B), with the
# longest context: the model's own, and for Llama that of Llama 3.1.
LONGEST = {
    "opt-125m": 2048,
    "opt-6.7b": 2048,
    "opt-13b": 2048,
    "opt-30b": 2048,
    "llama-3.1-8b": 32768,
    "llama-3.1-70b": 32768,
}
MODELS = {
    Scale.FULL: tuple(LONGEST),
    Scale.QUICK: ("opt-6.7b", "llama-3.1-8b"),
    Scale.DRY: ("tiny", "tiny-llama"),
}
GOAL_DECODE, GOAL_LONE = (64, 2048), (1, 2048)  # sequences, context
DECODES = {
    Scale.FULL: [(n, c) for c in (128, 512, 2048, 8192, 32768) for n in (1, 8, 64, 256)],
    Scale.QUICK: [(1, 512), (8, 512), (64, 512), GOAL_DECODE, GOAL_LONE, (256, 512)],
    Scale.DRY: [(2, 40)],
}
# Decodes over a cache in 8 bits, by the models of `MODELS`.
EIGHT_BITS = ("int8", "fp8")
IN_8_BITS = {
    Scale.FULL: [GOAL_DECODE, (8, 2048)],
    Scale.QUICK: [GOAL_DECODE],
    Scale.DRY: [(2, 40)],
}
VERIFIED = 5  # query tokens of a verification: one token and four drafted ones
GOAL_CHUNK = 512  # tokens of the shortest chunk for which the goal counts
CHUNKS = {  # tokens, and tokens before them
    Scale.FULL: [(n, past) for past in (0, 4096) for n in (128, 512, 2048, 8192)],
    Scale.QUICK: [(512, 0), (2048, 0), (512, 4096), (2048, 4096)],
    Scale.DRY: [(20, 0), (20, 13)],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformBatch:
    """Sequences that all have the same sizes.

    Attributes:
        model: the model's name in a table.
        seqs: number of sequences.
        queries: tokens of each that are run.
        past: tokens of each that have KV already.
        decode: true if they are run as decodes, false for prefill chunks.
        kv_cache_dtype: as in `EngineConfig`.
    """

    model: str
    heads: Heads
    seqs: int
    queries: int
    past: int
    decode: bool
    block_size: int = BLOCK_SIZE
    kv_cache_dtype: str = "auto"

    @property
    def context(self) -> int:
        """The tokens of each sequence that have KV afterwards."""
        return self.past + self.queries

    @property
    def case(self) -> dict[str, str | int]:
        """The values that distinguish the batch from others, for its row."""
        if self.decode:
            case = {"batch": self.seqs, "context": self.context}
            more: dict[str, str | int] = {"queries": self.queries} if self.queries > 1 else {}
        else:
            case = {"chunk": self.queries, "past": self.past}
            more = {"batch": self.seqs} if self.seqs > 1 else {}
        if self.kv_cache_dtype != "auto":
            more["kv"] = self.kv_cache_dtype
        return {"model": self.model, **case, **more}

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one layer's keys and values."""
        _, num_kv_heads, head_dim = self.heads
        per_head = head_bytes(head_dim, dtype, self.kv_cache_dtype)
        return 2 * self.seqs * self.context * num_kv_heads * per_head

    def least_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that must move: keys, values and queries in, the output out."""
        num_heads, _, head_dim = self.heads
        query = self.seqs * self.queries * num_heads * head_dim * dtype.itemsize
        return self.kv_bytes(dtype) + 2 * query

    @property
    def flops(self) -> int:
        """The operations of both matrix products, without those that causal masking removes."""
        num_heads, _, head_dim = self.heads
        pairs = self.queries * self.past + self.queries * (self.queries + 1) // 2
        return 4 * self.seqs * num_heads * head_dim * pairs

    def metadata(self, tables: Tensor, block_size: int) -> AttentionMetadata:
        """Return metadata for KV in the blocks of int64 ``tables [seqs, blocks]``."""
        device = tables.device
        positions = torch.arange(self.past, self.context, device=device)
        slots = tables[:, positions // block_size] * block_size + positions % block_size
        starts = [i * self.queries for i in range(self.seqs + 1)]
        lengths = [self.context] * self.seqs
        return AttentionMetadata(
            query_start_loc=starts,
            seq_lens=lengths,
            block_tables=tables,
            slot_mapping=slots.flatten(),
            block_size=block_size,
            num_decodes=self.seqs if self.decode else 0,
            starts=torch.tensor(starts, device=device),
            lengths=torch.tensor(lengths, device=device),
        )


class AttentionInputs:
    """Queries, keys and values of one batch, in one or more sets of inputs.

    Attributes:
        query: ``[seqs * queries, num_heads, head_dim]``, for all sets.
        key, value: ``[num_sets, seqs, context, num_kv_heads, head_dim]``; in float32 what a cache
            in 8 bits holds.
    """

    def __init__(self, batch: UniformBatch, setting: KernelSetting, num_sets: int) -> None:
        self.batch = batch
        self.setting = setting
        self.num_sets = num_sets

    @cached_property
    def query(self) -> Tensor:
        num_heads, _, head_dim = self.batch.heads
        return self.setting.randn(self.batch.seqs * self.batch.queries, num_heads, head_dim)

    @cached_property
    def key(self) -> Tensor:
        return self._values()

    @cached_property
    def value(self) -> Tensor:
        return self._values()

    def _values(self) -> Tensor:
        _, num_kv_heads, head_dim = self.batch.heads
        values = self.setting.randn(
            self.num_sets, self.batch.seqs, self.batch.context, num_kv_heads, head_dim
        )
        form = KV_FORMS[self.batch.kv_cache_dtype]
        if form is None or not self.setting.filled:
            return values
        stored, scales = quantize(values, form)
        return stored.float().mul_(scales.unsqueeze(-1))

    def expected(self) -> Tensor:
        """Return the first set's attention in plain float32: ``[tokens, heads * head_dim]``."""
        batch, out = self.batch, torch.empty(self.query.shape, device=self.query.device)
        num_heads, num_kv_heads, head_dim = batch.heads
        group = num_heads // num_kv_heads
        size = (batch.seqs, batch.queries, num_kv_heads, group, head_dim)
        query, rows = self.query.view(size), out.view(size)
        position = torch.arange(batch.context, device=query.device)
        unseen = position > position[batch.past :, None]
        # A prefill's scores of all heads would not fit into memory.
        step = num_kv_heads if batch.decode else 1
        for i in range(batch.seqs):
            for first in range(0, num_kv_heads, step):
                heads = slice(first, first + step)
                key = self.key[0, i, :, heads].float().permute(1, 2, 0)
                value = self.value[0, i, :, heads].float().transpose(0, 1)
                wide = query[i, :, heads].float().permute(1, 2, 0, 3).flatten(1, 2)
                scores = torch.bmm(wide, key).mul_(batch.heads.scale)
                scores.view(step, group, *unseen.shape).masked_fill_(unseen, -torch.inf)
                answer = torch.bmm(scores.softmax(-1), value)
                answer = answer.view(step, group, batch.queries, head_dim)
                rows[i, :, heads] = answer.permute(2, 0, 1, 3)
        return out.flatten(1)

    def paged(
        self, backend: AttentionBackend, block_size: int
    ) -> tuple[LayerKV, list[AttentionMetadata]]:
        """Return one cache with all sets, and the prepared metadata of each set.

        The blocks of a set are scattered over the cache, as they are when minserve serves.
        """
        batch, device = self.batch, self.setting.device
        per_seq = -(-batch.context // block_size)
        num_blocks = self.num_sets * batch.seqs * per_seq
        # Without values the kernels are only compiled, and no block is touched.
        allocated = num_blocks if self.setting.filled else 1
        kv = backend.allocate(allocated, block_size, self.setting.dtype, device)
        tables = torch.randperm(num_blocks, device=device).view(-1, batch.seqs, per_seq)
        if self.setting.filled:
            position = torch.arange(batch.context, device=device)
            blocks, offsets = tables[:, :, position // block_size], position % block_size
            fill(kv, blocks, offsets, self.key, self.value)
        planned = [batch.metadata(table, block_size) for table in tables]
        for metadata in planned:
            backend.prepare(metadata)
        return kv, planned


def fill(kv: LayerKV, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
    """Store keys and values ``[..., num_kv_heads, head_dim]`` in their places ``[...]``."""
    if kv.scales is None:
        kv.key[blocks, offsets], kv.value[blocks, offsets] = key, value
        return
    form = next(form for form in KV_FORMS.values() if form and form.dtype is kv.key.dtype)
    for x, cache, factors in ((key, kv.key, kv.scales.key), (value, kv.value, kv.scales.value)):
        stored, scales = quantize(x, form)
        raw(cache)[blocks, offsets] = raw(stored)
        factors[blocks, :, offsets] = scales


def attention_problem(batch: UniformBatch, setting: KernelSetting) -> Problem:
    """Return the problem of a batch."""
    kv_bytes = batch.kv_bytes(setting.dtype)
    num_sets = setting.num_sets(kv_bytes)
    inputs = AttentionInputs(batch, setting, num_sets)
    contestants: dict[str, Callable[[], Contestant]] = {
        OURS: lambda: _paged(inputs, "triton", batch.block_size),
        "sdpa": lambda: _sdpa(inputs),
        "torch": lambda: _paged(inputs, "torch", batch.block_size),
    }
    if batch.kv_cache_dtype == "auto":
        contestants["flash-attn"] = lambda: _paged(inputs, "flash-attn", FLASH_ATTN_BLOCK_SIZE)
        if not batch.decode and not batch.past:
            contestants["cudnn"] = lambda: _cudnn(inputs)
    return Problem(
        kernel="decode" if batch.decode else "prefill",
        case=batch.case,
        dtype=setting.dtype,
        least_bytes=batch.least_bytes(setting.dtype),
        flops=batch.flops,
        # The inputs, a cache, and what a contestant gathers or a reference needs. The inputs of a
        # cache in 8 bits are in float32.
        memory=(3 if batch.kv_cache_dtype == "auto" else 16) * num_sets * kv_bytes
        + 4 * batch.queries * batch.context * batch.seqs,
        expected=inputs.expected,
        contestants=contestants,
    )


def _paged(inputs: AttentionInputs, name: str, block_size: int) -> Contestant:
    """Return a contestant that runs one of minserve's backends over its own cache."""
    heads = inputs.batch.heads
    backend = make_attention_backend(name, *heads, heads.scale, inputs.batch.kv_cache_dtype)
    kv, planned = inputs.paged(backend, block_size)
    runs = [lambda m=metadata: backend.forward(inputs.query, kv, m) for metadata in planned]
    return Contestant(runs, runs[0])


def _sdpa(inputs: AttentionInputs) -> Contestant:
    """Return a contestant that runs torch's flash attention over contiguous keys and values."""
    batch = inputs.batch
    num_heads, num_kv_heads, head_dim = batch.heads
    size = (batch.seqs, batch.queries, num_heads, head_dim)
    query = inputs.query.view(size).transpose(1, 2)
    mask = None
    keys, values = (x.to(query.dtype).transpose(2, 3) for x in (inputs.key, inputs.value))
    if batch.queries > 1:
        mask = causal_lower_right(batch.queries, batch.context)
        # That mask does not support grouped heads.
        group = num_heads // num_kv_heads
        keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)
    keys, values = keys.contiguous(), values.contiguous()
    allowed = [SDPBackend.FLASH_ATTENTION]
    if not query.is_cuda:
        allowed.append(SDPBackend.MATH)

    def run(i: int) -> Tensor:
        with sdpa_kernel(allowed):
            return F.scaled_dot_product_attention(
                query, keys[i], values[i], mask, scale=batch.heads.scale,
                enable_gqa=mask is None and num_heads > num_kv_heads,
            )  # fmt: skip

    return _contiguous(inputs, run)


def _cudnn(inputs: AttentionInputs) -> Contestant:
    """Return a contestant that runs cuDNN's attention over contiguous keys and values of whole
    prompts: torch gives it no mask for chunks behind a context.
    """
    batch = inputs.batch
    num_heads, num_kv_heads, head_dim = batch.heads
    query = inputs.query.view(batch.seqs, batch.queries, num_heads, head_dim).transpose(1, 2)
    keys, values = (
        x.to(query.dtype).transpose(2, 3).contiguous() for x in (inputs.key, inputs.value)
    )

    def run(i: int) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(
                query, keys[i], values[i], is_causal=True, scale=batch.heads.scale,
                enable_gqa=num_heads > num_kv_heads,
            )  # fmt: skip

    return _contiguous(inputs, run)


def _contiguous(inputs: AttentionInputs, run: Callable[[int], Tensor]) -> Contestant:
    """Return a contestant from ``[seqs, num_heads, queries, head_dim]`` of each set of inputs."""
    num_heads, _, head_dim = inputs.batch.heads
    runs = [lambda i=i: run(i) for i in range(inputs.num_sets)]
    return Contestant(runs, lambda: run(0).transpose(1, 2).reshape(-1, num_heads * head_dim))


def attention_problems(kernel: str, scale: Scale) -> list[partial[Problem]]:
    """Return problems with batches of real models, for ``decode`` or ``prefill``."""
    return [partial(attention_problem, batch) for batch in attention_batches(kernel, scale)]


def attention_batches(kernel: str, scale: Scale) -> list[UniformBatch]:
    """Return batches of real models, for ``decode`` or ``prefill``."""
    return list(_decode_batches(scale) if kernel == "decode" else _prefill_batches(scale))


def _decode_batches(scale: Scale) -> Iterator[UniformBatch]:
    """Yield batches of decodes, and of draft verifications by the last model."""
    for model in MODELS[scale]:
        for seqs, context in DECODES[scale]:
            if context <= LONGEST.get(model, context):
                yield _batch(model, seqs, 1, context - 1, decode=True)
    for seqs, context in DECODES[scale]:
        if context == GOAL_DECODE[1] or scale is Scale.DRY:
            yield _batch(MODELS[scale][-1], seqs, VERIFIED, context - VERIFIED, decode=True)
    for model in MODELS[scale]:
        for seqs, context in IN_8_BITS[scale]:
            for form in EIGHT_BITS:
                yield _batch(model, seqs, 1, context - 1, decode=True, kv_cache_dtype=form)


def _prefill_batches(scale: Scale) -> Iterator[UniformBatch]:
    """Yield first chunks and later chunks, and one batch of four prompts."""
    for model in MODELS[scale]:
        for chunk, past in CHUNKS[scale]:
            yield _batch(model, 1, chunk, past, decode=False)
    yield _batch(MODELS[scale][-1], 4, CHUNKS[scale][0][0], 0, decode=False)
    for form in EIGHT_BITS:
        yield _batch(MODELS[scale][-1], 1, *CHUNKS[scale][-1], decode=False, kv_cache_dtype=form)


def _batch(
    model: str, seqs: int, queries: int, past: int, *, decode: bool, kv_cache_dtype: str = "auto"
) -> UniformBatch:
    return UniformBatch(
        model=model, heads=Heads.of(model), seqs=seqs, queries=queries, past=past, decode=decode,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
