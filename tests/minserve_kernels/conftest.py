"""Kernels run on a GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# The interpreter's bfloat16 is not a GPU's.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
