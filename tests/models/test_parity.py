"""Every model variant agrees with transformers; the cases are those of bench/parity.py."""

from __future__ import annotations

import parity
import pytest
import torch

from minserve.models.families import FAMILIES
from minserve.models.layers import OneDnnLinear, WeightFormat, WeightPlacement
from shared.reference_models.variants import ModelVariant


@pytest.mark.parametrize("case", parity.CASES, ids=lambda c: c.name)
def test_logits_and_greedy_tokens_agree_with_transformers(case: ModelVariant) -> None:
    assert parity.compare(case).mismatches == []


def test_every_family_is_compared_in_both_dtypes_and_as_gguf() -> None:
    for family in FAMILIES:
        cases = [case for case in parity.CASES if case.family == family]
        assert {case.dtype for case in cases} == {"float32", "bfloat16"}
        assert "gguf" in {case.form for case in cases}


@pytest.mark.parametrize("rows", [1, 7, 300, 700])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", [f for f in WeightFormat if f is not WeightFormat.FBGEMM_INT8])
def test_every_unquantized_weight_format_multiplies_alike(
    form: WeightFormat, bias: bool, rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Values that float16 holds exactly, so that only the order of sums can differ.
    weight = torch.randn(48, 96, generator=generator).half().float()
    x, b = torch.randn(rows, 96, generator=generator), torch.randn(48, generator=generator)
    weight_dtype = torch.float16 if form is WeightFormat.FBGEMM_FP16 else torch.float32
    want = x.double() @ weight.double().T + (b.double() if bias else 0)
    placement = WeightPlacement(torch.device("cpu"), torch.float32, weight_dtype, form)
    got = placement.linear(weight, b if bias else None)(x)
    assert (got - want).abs().max() < 1e-4


def test_float32_on_a_cpu_takes_the_prepacked_form() -> None:
    placement = WeightPlacement.choose(torch.device("cpu"), "float32")
    assert placement.dtype is placement.weight_dtype is torch.float32
    if torch.backends.mkldnn.is_available():
        assert isinstance(placement.linear(torch.zeros(4, 4)), OneDnnLinear)
