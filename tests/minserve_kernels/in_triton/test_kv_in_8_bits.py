"""Kernels that write and read KV in 8 bits, against torch's rounding and attention written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import expected, make_inputs, make_metadata

from minserve.kernels.attention import LayerKV
from minserve.kernels.kv_quantization import FP8, INT8, KVForm, KVScales, quantize, raw
from minserve.kernels.torch_backend import TorchBackend
from minserve.kernels.triton_backend import TritonBackend

BLOCK = 16
HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (query heads, KV heads, head_dim).
SMALL, PHI, GROUPED = (2, 1, 16), (3, 1, 96), (8, 2, 128)
BATCHES = {
    "decodes": (GROUPED, [(1, 122), (1, 0), (1, 64)], 3),
    "verification": (PHI, [(9, 0), (1, 70), (9, 55)], 3),
    "long decodes, split": (SMALL, [(1, 1000), (1, 0), (3, 700)], 3),
    "chunks behind a context": (PHI, [(5, 60), (70, 64)], 0),
    "a chunk behind a long context, split": (SMALL, [(9, 1020), (3, 40)], 0),
}


# In the interpreter, which is slow, each form has a dtype of its own for whole attention.
PAIRS = (
    [(form, dtype) for form in (INT8, FP8) for dtype in DTYPES]
    if HAS_GPU
    else [(INT8, torch.float32), (FP8, torch.float16)]
)


@pytest.fixture(params=[INT8, FP8], ids=["int8", "fp8"])
def form(request: pytest.FixtureRequest) -> KVForm:
    skip_where_missing(request.param)
    return request.param


def skip_where_missing(form: KVForm) -> None:
    if form is FP8 and HAS_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert e4m3")


def in_8_bits(kv: LayerKV, form: KVForm, dtype: torch.dtype) -> LayerKV:
    """The same cache in 8 bits, laid out for Triton; where nobody owns it, scales are NaN."""
    (key, key_scale), (value, value_scale) = (quantize(x, form) for x in (kv.key, kv.value))
    factors = (scale.transpose(1, 2).contiguous() for scale in (key_scale, value_scale))
    return LayerKV(key, value, scales=KVScales(*factors, dtype))


def dequantized(kv: LayerKV) -> LayerKV:
    """What a cache in 8 bits holds, in float32."""
    scales = (scale.transpose(1, 2).unsqueeze(-1) for scale in (kv.scales.key, kv.scales.value))
    return LayerKV(*(x.float() * s for x, s in zip((kv.key, kv.value), scales, strict=True)))


@pytest.mark.parametrize(("form", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_is_that_of_the_dequantized_cache(
    batch: str, form: KVForm, dtype: torch.dtype, device: torch.device
) -> None:
    skip_where_missing(form)
    heads, lengths, num_decodes = BATCHES[batch]
    query, exact_kv, metadata = make_inputs(
        heads, lengths, dtype, device, block_size=BLOCK, num_decodes=num_decodes
    )
    kv = in_8_bits(exact_kv, form, dtype)
    backend = TritonBackend(*heads, heads[2] ** -0.5)
    backend.kv_form = form
    backend.allocate(1, BLOCK, dtype, device)
    backend.prepare(metadata)
    out = backend.forward(query, kv, metadata)
    held = dequantized(kv)
    plain, exact = expected(query, held, metadata, dtype), expected(query, held, metadata)
    # Weights times scales are rounded, and outputs: one rounding more than the plain computation.
    error, allowed = ((x.double() - exact).abs().max() for x in (out, plain))
    assert out.dtype is dtype
    assert error <= 3 * allowed + 4e-6 * exact.abs().max()
    # Not by chance: what was lost in 8 bits shows.
    assert (out - expected(query, exact_kv, metadata)).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [GROUPED, PHI, (9, 3, 64), SMALL], ids=str)
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rotated"])
def test_what_is_written_is_torchs_rounding_of_what_would_be_written(
    heads: tuple[int, int, int],
    rope: bool,
    form: KVForm,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    num_heads, num_kv_heads, dim = heads
    metadata, num_blocks = make_metadata([(5, 3), (1, 17), (4, 0)], 0, BLOCK, device)
    metadata.slot_mapping[3] = -1  # a row of padding
    torch.manual_seed(0)
    qkv = torch.randn(10, num_heads + 2 * num_kv_heads, dim, device=device).to(dtype)
    qkv[5, num_heads] = 0.0
    angles = torch.rand(10, 1, dim // 2, device=device) * 6
    turns = torch.polar(torch.ones_like(angles), angles) if rope else None
    caches, queries = [], []
    for own_form in (None, form):
        backend = TritonBackend(*heads, dim**-0.5)
        backend.kv_form = own_form
        kv = backend.allocate(num_blocks, BLOCK, dtype, device)
        own = qkv.clone()
        backend.write_kv(own, kv, metadata, turns)
        caches.append(kv)
        queries.append(own)
    want = in_8_bits(caches[0], form, dtype)
    assert want.key.float().any()
    for got, wanted in zip(caches[1].parts, want.parts, strict=True):
        assert torch.equal(got.float(), wanted.float())
    assert torch.equal(*queries)


@pytest.mark.parametrize("batch", ["verification", "chunks behind a context"])
def test_a_layer_is_that_of_the_torch_backend(
    batch: str, form: KVForm, device: torch.device
) -> None:
    heads, lengths, num_decodes = BATCHES[batch]
    num_heads, num_kv_heads, dim = heads
    metadata, num_blocks = make_metadata(lengths, num_decodes, BLOCK, device)
    torch.manual_seed(0)
    qkv = torch.randn(metadata.num_tokens, num_heads + 2 * num_kv_heads, dim, device=device)
    earlier = LayerKV(*torch.randn(2, num_blocks, BLOCK, num_kv_heads, dim, device=device))
    outputs = []
    for kind in (TorchBackend, TritonBackend):
        backend = kind(*heads, dim**-0.5)
        backend.kv_form = form
        kv, mine = backend.allocate(num_blocks, BLOCK, torch.float32, device), replace(metadata)
        for part, value in zip(
            kv.parts, in_8_bits(earlier, form, torch.float32).parts, strict=True
        ):
            raw(part).copy_(raw(value))
        own = qkv.clone()
        with torch.inference_mode():
            backend.prepare(mine)
            backend.write_kv(own, kv, mine)
            outputs.append(backend.forward(own[:, :num_heads], kv, mine))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
