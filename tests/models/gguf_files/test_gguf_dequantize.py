"""Blocks are dequantized in steps and threads to the bits that the gguf package gives at once."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGML

from minserve.models.gguf_files import gguf_dequantize
from minserve.models.gguf_files.gguf_dequantize import dequantize


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random_blocks(kind: GGML, values: int) -> np.ndarray:
    """Any bytes are blocks of any type; a float16 among them may be infinite or no number."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, values // block * block_bytes, np.uint8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
# So many that threads share them, and fewer.
@pytest.mark.parametrize("steps", [0.5, 3.5, 20.5])
@pytest.mark.parametrize("kind", [GGML.Q4_0, GGML.Q4_K, GGML.Q5_K, GGML.Q6_K, GGML.IQ4_XS])
@pytest.mark.usefixtures("threads")
def test_every_value_is_the_packages(
    monkeypatch: pytest.MonkeyPatch, kind: GGML, steps: float
) -> None:
    monkeypatch.setattr(gguf_dequantize, "_STEP", 2**12)
    raw = random_blocks(kind, int(steps * 2**12))
    expected = gguf.quants.dequantize(raw, kind)
    assert np.array_equal(
        dequantize(raw, kind).numpy().view(np.uint32), expected.view(np.uint32).reshape(-1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    blocks = random_blocks(GGML.Q8_0, 2**14).reshape(-1, 34)
    blocks[:, :2] = np.frombuffer(np.float16(0.37).tobytes(), np.uint8)
    got = dequantize(blocks.reshape(-1), GGML.Q8_0, dtype)
    assert got.dtype is dtype
    assert torch.equal(got, dequantize(blocks.reshape(-1), GGML.Q8_0).to(dtype))


@pytest.mark.usefixtures("threads")
def test_a_type_that_is_unknown_to_the_package_is_said() -> None:
    with pytest.raises(NotImplementedError):
        dequantize(np.zeros(2**22, np.uint8), GGML.I32)
