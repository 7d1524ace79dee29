"""Weights that stay packed are the weights that they stand for, whatever a model does to them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Q_PROJ, weights_of
from packers import FORMS, Form, awq, compressed, fp8, gptq
from quantized_folders import ON_GPU, logits, quantized, write
from torch import Tensor

from minserve.kernels.packed_matrix import ValueKind
from minserve.models.finding.source import find_model
from minserve.models.packed_layers import PackedLinear
from minserve.models.rope import interleave
from minserve.models.tensor_part import TensorPart
from minserve.models.weights.loader import open_checkpoint
from minserve.models.weights.packed_tensor import PackedTensor

LINEAR = Q_PROJ.removesuffix(".weight")
# Forms of which no kernel knows the groups: their blocks are 40 inputs wide.
UNPACKED = {"fp8-block", "ct-float-block"}
ACT_ORDER = {"gptq-4-act-order"}
# One of each format and kind of value: the interpreter takes its time.
RUN = (
    *("gptq-4", "gptq-4-act-order", "gptq-8-one-group", "awq-gemm", "fp8-channel", "fp8-block"),
    *("ct-pack-4-asymmetric", "ct-int-asymmetric"),
)


def read(form: Form, like: Path, folder: Path, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Write a linear of 64 outputs and 160 inputs, and return it as it is read, and its weight."""
    made = form.make(64, 160, torch.Generator().manual_seed(seed))
    stored = {f"{LINEAR}.{part}": one for part, one in made.stored.items()}
    with open_checkpoint(find_model(str(write(folder, like, stored, form.settings)))) as checkpoint:
        checkpoint.keeps_packed = True
        return checkpoint.get(Q_PROJ, (64, 160)), made.weight


@pytest.mark.parametrize("form", RUN)
def test_a_model_on_packed_weights_gives_the_logits_of_unpacked_ones(
    form: str, tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The order of inputs is random for each linear, so those that are joined are unpacked."""
    packed, plain = quantized(FORMS[form], tiny_llama_dir, tmp_path)
    want = logits(plain, also_decode=True)
    with caplog.at_level(logging.WARNING, "minserve.models"):
        got = logits(packed, ON_GPU, also_decode=True).cpu()
    assert (got - want).abs().max() <= 2e-4 * want.abs().max()
    words = " ".join(caplog.messages)
    assert ("no kernel runs on" in words) is (form in UNPACKED)
    assert ("quantized in different ways" in words) is (form in ACT_ORDER)


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_tensor_is_its_weight(form: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    tensor, weight = read(FORMS[form], tiny_llama_dir, tmp_path / "one")
    assert isinstance(tensor, PackedTensor) is (form not in UNPACKED)
    assert tensor.shape == weight.shape
    assert tensor.dtype is torch.float32
    assert torch.equal(tensor + 0.0, weight)


# What families do to weights, to one or two of them.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "join": lambda one, other: torch.cat([one, other]),
    "split and join": lambda one, _: torch.cat(list(reversed(one.split([24, 40])))),
    "interleave": lambda one, _: interleave(one, 16, 8),
    "interleave and join": lambda one, other: torch.cat((interleave(one, 32, 32), other)),
    "scale": lambda one, _: one.float() * 0.22,
    "some rows": lambda one, _: one[8:32],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "form", [gptq(4, 32), awq(-1), fp8(None, "channel"), compressed("int-quantized", "channel")]
)
def test_rows_that_are_joined_ordered_or_scaled_stay_packed(
    form: Form, step: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    read_twice = [read(form, tiny_llama_dir, tmp_path / str(seed), seed=seed) for seed in range(2)]
    (one, weight), (other, other_weight) = read_twice
    got, want = STEPS[step](one, other), STEPS[step](weight, other_weight)
    assert isinstance(got, PackedTensor)
    assert got.shape == want.shape
    assert ((got + 0.0) - want).abs().max() <= 1e-7 * want.abs().max()


@pytest.mark.parametrize(
    ("form", "part", "stays_packed"),
    [
        (gptq(4, 32), TensorPart(0, ((16, 32),)), True),
        (gptq(4, 32), TensorPart(0, ((0, 16), (0, 16), (16, 16))), True),  # KV heads, repeated
        (gptq(4, 32), TensorPart(1, ((32, 64),)), True),
        (gptq(4, 32), TensorPart(1, ((80, 80),)), True),  # halves of groups
        (gptq(4, 32), TensorPart(1, ((40, 40),)), False),  # quarters, too small for the kernels
        (gptq(4, 32, act_order=True), TensorPart(0, ((16, 32),)), True),
        (gptq(4, 32, act_order=True), TensorPart(1, ((32, 64),)), False),
        (awq(-1), TensorPart(1, ((40, 40),)), True),
        (compressed("int-quantized", "channel"), TensorPart(1, ((40, 40),)), True),
    ],
)
def test_a_ranks_part_stays_packed_where_kernels_run_on_it(
    form: Form, part: TensorPart, stays_packed: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    made = form.make(64, 160, torch.Generator().manual_seed(0))
    stored = {f"{LINEAR}.{name}": one for name, one in made.stored.items()}
    folder = write(tmp_path / "one", tiny_llama_dir, stored, form.settings)
    with open_checkpoint(find_model(str(folder))) as checkpoint:
        checkpoint.keeps_packed = True
        got = checkpoint.get(Q_PROJ, (64, 160), part)
    assert isinstance(got, PackedTensor) is stays_packed
    assert torch.equal(got + 0.0, part.cut(made.weight))


def test_inputs_of_a_common_order_are_joined(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """As GPTQ quantizes queries, keys and values: by the same inputs, and so in the same order."""
    one, weight = read(gptq(4, 16, act_order=True), tiny_llama_dir, tmp_path / "one")
    both = torch.cat([one, one])
    assert isinstance(both, PackedTensor)
    assert both.rows.order is not None
    linear = ON_GPU.linear(both)
    assert isinstance(linear, PackedLinear)
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(0))
    want = x.double() @ torch.cat([weight, weight]).double().t()
    got = linear(x.to(ON_GPU.device)).cpu()
    assert (got.double() - want).abs().max() <= 2e-6 * want.abs().max()


def test_weights_of_different_forms_are_unpacked_to_be_joined(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, weight = read(gptq(4, 32), tiny_llama_dir, tmp_path / "one")
    other, other_weight = read(gptq(8, 32), tiny_llama_dir, tmp_path / "other")
    with caplog.at_level(logging.WARNING, "minserve.models"):
        both = torch.cat([one, other])
    assert torch.equal(both, torch.cat([weight, other_weight]))
    assert not isinstance(both, PackedTensor)
    assert re.search("64 outputs and 64 outputs are unpacked", caplog.text)


def test_other_uses_are_those_of_the_weight(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """An embedding that is stored quantized, as a head tied to it may be."""
    tensor, weight = read(awq(32), tiny_llama_dir, tmp_path / "one")
    table = ON_GPU.embedding(tensor)
    assert torch.equal(table.cpu(), weight)
    assert not isinstance(table, PackedTensor)
    assert torch.equal(tensor[:, :3], weight[:, :3])
    assert torch.equal(tensor[5], weight[5])
    assert torch.equal(torch.cat([tensor, tensor], dim=1), torch.cat([weight, weight], dim=1))


def test_zeros_that_are_all_the_middle_take_no_memory(tiny_llama_dir: Path, tmp_path: Path) -> None:
    form = compressed("pack-quantized", "group", bits=4, block=[1, 32])
    tensor, _ = read(form, tiny_llama_dir, tmp_path / "one")
    assert isinstance(tensor, PackedTensor)
    assert tensor.rows.kind is ValueKind.INT4
    assert tensor.rows.zero is None
    assert tensor.rows.scale.dtype.itemsize == 2


@pytest.mark.parametrize("form", ["gptq-4", "awq-gemv", "fp8-channel", "ct-int-channel"])
def test_the_size_of_packed_weights_is_known_before_they_are_read(
    form: str, tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed, plain = quantized(FORMS[form], tiny_llama_dir, tmp_path)
    stored, weights = weights_of(packed), weights_of(plain)
    with (
        caplog.at_level(logging.INFO, "minserve.models"),
        open_checkpoint(find_model(str(packed))) as checkpoint,
    ):
        number, octets = checkpoint.packed_size()
        checkpoint.keeps_packed = True
        checkpoint.get(Q_PROJ)
    assert number == sum(one.numel() for name, one in weights.items() if "_proj" in name)
    assert octets == sum(one.nbytes for name, one in stored.items() if "_proj" in name)
    assert "stay packed" in caplog.text
