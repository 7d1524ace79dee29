"""Row-wise problems of `kernel_bench.py`: norms, gate, KV writes, OPT's linear with its ReLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minserve.kernels.attention import make_attention_backend
from minserve.models.layers import (
    LAYER_NORM_EPS,
    DenseReluLinear,
    LayerNorm,
    Norm,
    RMSNorm,
    gelu_tanh_mul,
    silu_mul,
)
from parts.kernel_bench.attention import BLOCK_SIZE, UniformBatch
from shared.kernel_cases import OURS, Contestant, Heads, KernelSetting, Problem, Scale
from shared.synthetic_models import SHAPES

EPS = LAYER_NORM_EPS  # Llama 3 has the same value
MODELS = {
    Scale.FULL: ("opt-125m", "opt-6.7b", "opt-13b", "opt-30b", "llama-3.1-8b", "llama-3.1-70b"),
    Scale.QUICK: ("opt-6.7b", "llama-3.1-8b"),
    Scale.DRY: ("tiny", "tiny-llama"),
}
TOKENS = {Scale.FULL: (1, 64, 512, 4096), Scale.QUICK: (64, 4096), Scale.DRY: (3,)}
CUBLAS_KERNEL = "bias_relu"  # not written in Triton
KERNELS = (
    "rms_norm",
    "layer_norm",
    "qk_norm",
    "silu_mul",
    "gelu_tanh_mul",
    "write_kv",
    CUBLAS_KERNEL,
)


def row_problems(kernel: str, scale: Scale) -> list[partial[Problem]]:
    """Return the problems of one of `KERNELS`, at the sizes of the models that use it."""
    builds: dict[str, tuple[Callable[..., Problem], str]] = {
        "rms_norm": (norm_problem, "llama"),
        "layer_norm": (norm_problem, "opt"),
        "qk_norm": (qk_norm_problem, "llama"),
        "silu_mul": (gate_problem, "llama"),
        "gelu_tanh_mul": (partial(gate_problem, activation="gelu_tanh"), "llama"),
        "write_kv": (write_kv_problem, ""),
        "bias_relu": (bias_relu_problem, "opt"),
    }
    build, family = builds[kernel]
    is_norm = build is norm_problem
    variants = ({"residual": False}, {"residual": True}) if is_norm else ({},)
    return [
        partial(build, model, tokens, **variant)
        for model in MODELS[scale]
        if family in SHAPES[model]["model_type"]
        for tokens in TOKENS[scale]
        for variant in variants
    ]


def norm_problem(model: str, tokens: int, setting: KernelSetting, *, residual: bool) -> Problem:
    """Return the norm of a model's family, with or without the residual addition before it."""
    hidden, is_rms = SHAPES[model]["hidden_size"], SHAPES[model]["model_type"] == "llama"
    weight, bias = 1 + 0.1 * setting.randn(hidden), setting.randn(hidden)
    plain = RMSNorm(weight, EPS) if is_rms else LayerNorm(hidden, weight, bias)

    def run(norm: Norm, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm(x) if residual is None else norm.add(x, residual)[0]

    def ours(*inputs: Tensor) -> Tensor:
        from minserve.models.fused_layers import fused_layer_norm, fused_rms_norm

        fused = fused_rms_norm(weight, EPS) if is_rms else fused_layer_norm(weight, bias)
        return run(fused, *inputs)

    def exact(x: Tensor, residual: Tensor | None = None) -> Tensor:
        total = x.float() if residual is None else x.float() + residual.float()
        if is_rms:
            return F.rms_norm(total, (hidden,), weight.float(), EPS)
        return F.layer_norm(total, (hidden,), weight.float(), bias.float(), EPS)

    num_inputs = 1 + residual
    return _row_problem(
        "rms_norm" if is_rms else "layer_norm",
        {"model": model, "tokens": tokens, "residual": residual},
        setting,
        [(tokens, hidden)] * num_inputs,
        # The input is read and the output written; a residual is read and written in addition.
        2 * num_inputs * tokens * hidden * setting.dtype.itemsize,
        {OURS: ours, "torch": partial(run, plain)},
        exact,
    )


def qk_norm_problem(model: str, tokens: int, setting: KernelSetting) -> Problem:
    """Return the norm of each head of queries and keys, in place among a layer's values."""
    num_heads, num_kv_heads, head_dim = Heads.of(model)
    normed = num_heads + num_kv_heads
    rows = (normed + num_kv_heads, head_dim)
    # With these weights a norm in place may run again and again, and changes nothing any more.
    weight = torch.ones(normed, head_dim, device=setting.device)
    plain = RMSNorm(weight, EPS)

    def replaced(norm: Norm, x: Tensor) -> Tensor:
        norm.replace(x.view(-1, *rows)[:, :normed])
        return x

    def ours(x: Tensor) -> Tensor:
        from minserve.models.fused_layers import fused_rms_norm

        return replaced(fused_rms_norm(weight, EPS), x)

    return _row_problem(
        "qk_norm",
        {"model": model, "tokens": tokens},
        setting,
        [(tokens, rows[0] * head_dim)],
        2 * tokens * normed * head_dim * setting.dtype.itemsize,
        {OURS: ours, "torch": partial(replaced, plain)},
        lambda x: replaced(plain, x.float()),
    )


def gate_problem(
    model: str, tokens: int, setting: KernelSetting, *, activation: str = "silu"
) -> Problem:
    """Return the problem of the gate in a Llama's MLP, or in one of its relatives'."""
    width = SHAPES[model]["intermediate_size"]
    plain = silu_mul if activation == "silu" else gelu_tanh_mul

    def ours(x: Tensor) -> Tensor:
        from minserve.kernels.triton import gate

        return (gate.silu_mul if activation == "silu" else gate.gelu_tanh_mul)(x)

    return _row_problem(
        f"{activation}_mul",
        {"model": model, "tokens": tokens},
        setting,
        [(tokens, 2 * width)],
        3 * tokens * width * setting.dtype.itemsize,
        {OURS: ours, "torch": plain},
        lambda x: plain(x.float()),
    )


def bias_relu_problem(model: str, tokens: int, setting: KernelSetting) -> Problem:
    """Return OPT's first MLP linear: with ReLU within the matmul, or after it."""
    hidden, width = SHAPES[model]["hidden_size"], SHAPES[model]["ffn_dim"]
    weight, bias = 0.02 * setting.randn(width, hidden), setting.randn(width)
    rows = tokens * (hidden + width) * setting.dtype.itemsize
    return _row_problem(
        "bias_relu",
        {"model": model, "tokens": tokens},
        setting,
        [(tokens, hidden)],
        rows + weight.nbytes,
        {
            OURS: DenseReluLinear(weight, bias),
            "torch": lambda x: F.linear(x, weight, bias).relu_(),
        },
        lambda x: F.linear(x.float(), weight.float(), bias.float()).relu_(),
        flops=2 * tokens * hidden * width,
        # The weight is the same in all sets. Only work between two runs would keep it out of the
        # cache.
        num_sets=1,
    )


def _row_problem(
    kernel: str,
    case: dict[str, object],
    setting: KernelSetting,
    sizes: list[tuple[int, int]],
    least_bytes: int,
    forms: dict[str, Callable[..., Tensor]],
    exact: Callable[..., Tensor],
    flops: int = 0,
    num_sets: int | None = None,
) -> Problem:
    """Return a problem whose contestants are functions of tensors of ``sizes``.

    The functions may change their arguments.
    """
    num_sets = num_sets or setting.num_sets(least_bytes)
    sets = [[setting.randn(*size) for size in sizes] for _ in range(num_sets)]

    def build(form: Callable[..., Tensor]) -> Contestant:
        own = [[x.clone() for x in one] for one in sets]
        return Contestant([partial(form, *one) for one in own], partial(form, *own[0]))

    return Problem(
        kernel=kernel,
        case=case,
        dtype=setting.dtype,
        least_bytes=least_bytes,
        flops=flops,
        memory=3 * num_sets * least_bytes,
        expected=lambda: exact(*sets[0]),
        contestants={name: partial(build, form) for name, form in forms.items()},
    )


def write_kv_problem(model: str, tokens: int, setting: KernelSetting) -> Problem:
    """Return the write of keys and values of a model's heads, with RoPE if the model has it."""
    rope = SHAPES[model]["model_type"] == "llama"
    return kv_problem(model, Heads.of(model), tokens, BLOCK_SIZE, rope, setting)


def kv_problem(
    model: str,
    heads: Heads,
    tokens: int,
    block_size: int,
    rope: bool,
    setting: KernelSetting,
    kv_cache_dtype: str = "auto",
) -> Problem:
    """Return the write of a chunk of tokens through the backends, into scattered blocks."""
    num_heads, num_kv_heads, head_dim = heads
    num_rows, num_rotated = num_heads + 2 * num_kv_heads, num_heads + num_kv_heads
    # Keys and values are read and written; RoPE reads and writes the queries too.
    touched = num_rows if rope else 2 * num_kv_heads
    least_bytes = 2 * touched * tokens * head_dim * setting.dtype.itemsize
    num_sets, device = setting.num_sets(least_bytes), setting.device
    per_set = -(-tokens // block_size)
    tables = torch.randperm(num_sets * per_set, device=device).view(num_sets, 1, per_set)
    chunk = UniformBatch(
        model=model, heads=heads, seqs=1, queries=tokens, past=0, decode=False,
        block_size=block_size,
    )  # fmt: skip
    rotations = _rotations(tokens, head_dim, device) if rope else None
    sets = [setting.randn(tokens, num_rows, head_dim) for _ in range(num_sets)]

    def build(name: str) -> Contestant:
        backend = make_attention_backend(name, *heads, heads.scale, kv_cache_dtype)
        kv = backend.allocate(num_sets * per_set, block_size, setting.dtype, device)
        own = [qkv.clone() for qkv in sets]
        planned = [chunk.metadata(table, block_size) for table in tables]
        for metadata in planned:
            backend.prepare(metadata)

        def result() -> Tensor:
            backend.write_kv(own[0], kv, planned[0], rotations)
            slots = planned[0].slot_mapping
            blocks, offsets = slots // block_size, slots % block_size
            stored = kv.key[blocks, offsets], kv.value[blocks, offsets]
            return torch.cat([own[0][:, :num_heads], *stored], 1)

        runs = [
            lambda qkv=qkv, m=m: backend.write_kv(qkv, kv, m, rotations)
            for qkv, m in zip(own, planned, strict=True)
        ]
        return Contestant(runs, result)

    def expected() -> Tensor:
        wide = sets[0].to(torch.float32, copy=True)
        if rotations is not None:
            pairs = torch.view_as_complex(wide[:, :num_rotated].unflatten(-1, (-1, 2)).contiguous())
            wide[:, :num_rotated] = torch.view_as_real(pairs * rotations).flatten(-2)
        return wide

    return Problem(
        kernel="write_kv",
        case={"model": model, "tokens": tokens, "rope": rope},
        dtype=setting.dtype,
        least_bytes=least_bytes,
        memory=3 * num_sets * tokens * num_rows * head_dim * setting.dtype.itemsize,
        expected=expected,
        contestants={OURS: lambda: build("triton"), "torch": lambda: build("torch")},
    )


def _rotations(tokens: int, head_dim: int, device: torch.device) -> Tensor:
    """Return random rotations, complex64 ``[tokens, 1, head_dim / 2]``."""
    angles = torch.rand(tokens, 1, head_dim // 2, device=device) * 6.3
    return torch.polar(torch.ones_like(angles), angles)
