"""Every format gives a part of a tensor as it gives the whole, and reads no more than it has to."""

from __future__ import annotations

import re
from pathlib import Path

import parity
import pytest
import torch
from packers import FORMS
from quantized_folders import quantized
from safetensors.torch import save_file

from minserve.errors import ModelLoadError
from minserve.models.finding.source import find_model
from minserve.models.tensor_part import TensorPart
from minserve.models.weights.loader import open_checkpoint
from parts.parity.passes import chunked_logits, load, load_divided, make_runner
from parts.parity.rank_threads import RankThreads
from shared.reference_models.reference import reference_model, save
from shared.reference_models.variants import ModelVariant


def parts_of(shape: tuple[int, ...]) -> list[TensorPart]:
    """Runs of rows and columns, some of which cut groups and blocks of quantized weights."""
    return [
        part
        for dim, size in enumerate(shape)
        for part in (
            TensorPart(dim, ((0, size),)),
            TensorPart(dim, ((size // 4, size // 2),)),
            TensorPart(dim, ((size, 0),)),
            TensorPart.of(dim, ((3, 5), (3, 5), (0, 2), (2, size - 2))),
        )
    ]


def assert_parts(folder: Path) -> None:
    with open_checkpoint(find_model(str(folder)), progress=False) as checkpoint:
        for name in sorted(checkpoint.names()):
            shape = checkpoint.header(name).shape
            whole = checkpoint.get(name, shape)
            for part in parts_of(shape):
                got = checkpoint.get(name, shape, part)
                assert torch.equal(got, part.cut(whole)), (name, part)
                assert got.dtype is whole.dtype


def test_parts_of_safetensors_and_bin(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert_parts(tiny_llama_dir)
    case = ModelVariant("sharded", "opt", form="sharded")
    assert_parts(save(reference_model(case), tmp_path / "sharded", case))
    case = ModelVariant("bin", "opt", form="bin")
    assert_parts(save(reference_model(case), tmp_path / "bin", case))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma"])
def test_parts_of_gguf_files(family: str, tmp_path: Path) -> None:
    case = ModelVariant(family, family, form="gguf")
    assert_parts(save(reference_model(case), tmp_path, case))


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_quantized_weights(form: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    packed, _ = quantized(FORMS[form], tiny_llama_dir, tmp_path)
    assert_parts(packed)


@pytest.mark.parametrize("form", ["gptq-4-act-order", "awq-gemm", "fp8-block"])
def test_a_quantized_model_on_ranks_is_the_model_its_weights_stand_for(
    form: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    packed, plain = quantized(FORMS[form], tiny_llama_dir, tmp_path)
    prompts = parity.prompts((19,))
    (want,) = chunked_logits(make_runner(*load(plain)), prompts, 17)
    with RankThreads(4) as ranks:
        (got,) = chunked_logits(make_runner(*load_divided(packed, ranks)), prompts, 17)
    assert (want - got).abs().max() < 1e-4 * want.abs().max()


def test_a_part_of_a_tensor_of_another_shape_is_refused(tiny_llama_dir: Path) -> None:
    with (
        open_checkpoint(find_model(str(tiny_llama_dir)), progress=False) as checkpoint,
        pytest.raises(ModelLoadError, match=r"norm.weight' has shape \(64,\), but .* \(80,\)"),
    ):
        checkpoint.get("model.norm.weight", (80,), TensorPart(0, ((70, 10),)))


def resident(file: Path) -> int:
    """Return the bytes of a mapped file that this process holds in memory."""
    text = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf"{re.escape(str(file))}\n(?:\w+:.*\n)*?Rss: *(\d+) kB", text)
    return 1024 * sum(map(int, sizes))


def test_no_more_of_a_mapped_file_is_read_than_the_part(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    save_file({"model.big": torch.ones(8192, 1024)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    source = find_model(str(tmp_path))
    with open_checkpoint(source, progress=False) as checkpoint:
        part = checkpoint.get("model.big", (8192, 1024), TensorPart(0, ((1024, 1024),)))
        assert part.sum() == part.numel()
        assert resident(tmp_path / "model.safetensors") < 2 * part.nbytes
