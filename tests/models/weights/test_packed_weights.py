"""Quantized folders load as the models that their weights stand for, or say why they do not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Q_PROJ, weights_of
from packers import FORMS, Form, compressed, gptq
from quantized_folders import WEIGHTS, change, logits, quantized, set_settings, write
from safetensors.torch import load_file
from torch import Tensor

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.source import find_model, load_config
from minserve.models.tensor_check import require_tensors
from minserve.models.weights import affine
from minserve.models.weights.loader import open_checkpoint

K_PROJ = Q_PROJ.replace("q_proj", "k_proj")
LINEAR = Q_PROJ.removesuffix(".weight")

# Parts of a weight beside its values.
BESIDE = (
    *("scales", "qzeros", "g_idx", "weight_scale", "weight_scale_inv"),
    *("weight_zero_point", "weight_g_idx"),
)


# -------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_quantized_model_is_the_model_its_weights_stand_for(
    form: Form, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    packed, plain = quantized(form, tiny_llama_dir, tmp_path)
    want = weights_of(plain)
    with (
        open_checkpoint(find_model(str(packed))) as checkpoint,
        open_checkpoint(find_model(str(plain))) as twin,
    ):
        assert checkpoint.names() == set(want)
        assert checkpoint.num_parameters() == twin.num_parameters()
        for name in checkpoint.names():  # what headers say is what reading gives
            assert checkpoint.header(name).shape == tuple(checkpoint.get(name).shape), name
        for name, tensor in want.items():
            assert torch.equal(checkpoint.get(name, tuple(tensor.shape)), tensor), name
    assert torch.equal(logits(packed), logits(plain))
    assert logits(plain).std() > 0.1  # lively enough for a difference to show


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_weights_of_many_chunks_and_odd_sizes_are_unpacked_alike(
    form: Form, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affine, "CHUNK", 1024)
    cols = 96 if form.settings["quant_method"] != "gptq" else 160
    made = form.make(72, cols, torch.Generator().manual_seed(1))
    stored = {f"{LINEAR}.{part}": one for part, one in made.stored.items()}
    folder = write(tmp_path / "packed", tiny_llama_dir, stored, form.settings)
    with open_checkpoint(find_model(str(folder))) as checkpoint:
        assert torch.equal(checkpoint.get(Q_PROJ, (72, cols)), made.weight)


def test_a_gptq_order_of_zeros_means_that_inputs_keep_theirs(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    form = gptq(4, 32)
    made = form.make(64, 96, torch.Generator().manual_seed(0))
    stored = {f"{LINEAR}.{part}": one for part, one in made.stored.items()}
    assert len(stored[f"{LINEAR}.g_idx"].unique()) == 3
    stored[f"{LINEAR}.g_idx"] = torch.zeros_like(stored[f"{LINEAR}.g_idx"])
    folder = write(tmp_path / "packed", tiny_llama_dir, stored, form.settings)
    with open_checkpoint(find_model(str(folder))) as checkpoint:
        assert torch.equal(checkpoint.get(Q_PROJ, (64, 96)), made.weight)


def test_a_zero_stored_minus_one_borrows_within_its_word(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """GPTQModel takes 1 from all values of a word at once, so that a zero of 0 borrows."""
    form = gptq(4, 32, version="gptq_v2")
    made = form.make(256, 32, torch.Generator().manual_seed(0))
    assert (made.stored["qzeros"] & 15 == 0).any()
    stored = {f"{LINEAR}.{part}": one for part, one in made.stored.items()}
    stored[f"{LINEAR}.qzeros"] = stored[f"{LINEAR}.qzeros"] - 0x11111111
    settings = form.settings | {"checkpoint_format": "gptq"}
    folder = write(tmp_path / "packed", tiny_llama_dir, stored, settings)
    with open_checkpoint(find_model(str(folder))) as checkpoint:
        assert torch.equal(checkpoint.get(Q_PROJ), made.weight)


def test_settings_are_found_in_all_their_places(tiny_llama_dir: Path, tmp_path: Path) -> None:
    form = FORMS["gptq-4"]
    packed, plain = quantized(form, tiny_llama_dir, tmp_path)
    want = logits(plain)
    # Before transformers knew GPTQ, its settings had a file of their own, without a method.
    set_settings(packed, None)
    old = {k: v for k, v in form.settings.items() if k in ("bits", "group_size", "desc_act")}
    (packed / "quantize_config.json").write_text(json.dumps(old))
    assert torch.equal(logits(packed), want)
    (packed / "quantize_config.json").unlink()
    set_settings(packed, form.settings, "compression_config")
    assert torch.equal(logits(packed), want)


def test_a_quantized_head_loads(tiny_llama_dir: Path, tmp_path: Path) -> None:
    form = FORMS["gptq-4"]
    packed, plain = quantized(form, tiny_llama_dir, tmp_path)
    weight = weights_of(plain)["lm_head.weight"]
    made = form.make(*weight.shape, torch.Generator().manual_seed(2))
    parts = {f"lm_head.{part}": one for part, one in made.stored.items()}
    change(packed, {**parts, "lm_head.weight": None})
    set_settings(packed, form.settings | {"lm_head": True})
    change(plain, {"lm_head.weight": made.weight})
    assert torch.equal(logits(packed), logits(plain))


def test_each_linear_has_the_scheme_of_its_closest_target(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """By name before by pattern before by class, whatever the order of the groups."""
    by_class = compressed("pack-quantized", "channel", bits=4)
    by_pattern = compressed("pack-quantized", "channel", bits=8)
    by_name = compressed("pack-quantized", "channel", bits=2)
    targets = {
        "Linear": by_class,
        r"re:.*self_attn\.[qk]_proj$": by_pattern,
        "model.layers.0.self_attn.q_proj": by_name,
    }
    groups = {
        f"group_{i}": form.settings["config_groups"]["group_0"] | {"targets": [target]}
        for i, (target, form) in enumerate(targets.items())
    }
    settings = by_class.settings | {
        "config_groups": groups,
        "ignore": [r"re:.*mlp\.down_proj", "lm_head"],
    }
    rng = torch.Generator().manual_seed(0)
    forms = {"v_proj": by_class, "k_proj": by_pattern, "q_proj": by_name}
    stored = {"model.layers.0.mlp.down_proj.weight": torch.rand(16, 16)}
    want = dict(stored)
    for name, form in forms.items():
        made = form.make(32, 32, rng)
        prefix = f"model.layers.0.self_attn.{name}"
        stored |= {f"{prefix}.{part}": one for part, one in made.stored.items()}
        want[f"{prefix}.weight"] = made.weight
    folder = write(tmp_path / "packed", tiny_llama_dir, stored, settings)
    with open_checkpoint(find_model(str(folder))) as checkpoint:
        for name, weight in want.items():
            assert torch.equal(checkpoint.get(name), weight), name


def test_the_log_says_what_is_done_and_what_it_costs(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    form = FORMS["ct-int-channel"]
    settings = form.settings | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    packed, plain = quantized(form, tiny_llama_dir, tmp_path)
    set_settings(packed, settings)
    runtime = ("q_proj.input_scale", "k_scale", "v_scale")
    change(packed, {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in runtime})
    with (
        caplog.at_level(logging.INFO, "minserve.models"),
        open_checkpoint(find_model(str(packed))) as checkpoint,
    ):
        assert checkpoint.names() == set(weights_of(plain))
        unpacked = 2 * checkpoint.num_parameters() / 1e9
        for name in (Q_PROJ, K_PROJ):
            checkpoint.get(name)
    (message,) = caplog.messages
    on_disk = (packed / WEIGHTS).stat().st_size / 1e9
    assert str(packed) in message
    assert "compressed-tensors int-quantized" in message
    assert f"{on_disk:.3g} GB on disk" in message
    assert f"to {unpacked:.3g} GB" in message
    assert "activations are not quantized" in message
    assert "KV cache is not quantized" in message


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"quant_method": method, "bits": 4}, method)
            for method in (
                *("bitsandbytes", "hqq", "torchao", "aqlm", "quip", "eetq", "vptq", "mxfp4"),
                *("modelopt", "quark", "auto-round", "higgs", "spqr", "fp_quant", "bitnet"),
            )
        ),
        ({"load_in_8bit": True}, "None"),
        (FORMS["gptq-4"].settings | {"bits": 3}, "3 bits.*2, 4, 8"),
        (FORMS["gptq-4"].settings | {"checkpoint_format": "marlin"}, "'marlin'.*gptq_v2"),
        (FORMS["gptq-4"].settings | {"is_marlin_format": True}, "'marlin'"),
        (FORMS["gptq-4"].settings | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        (FORMS["gptq-4"].settings | {"pack_dtype": "int16"}, "int16"),
        (FORMS["gptq-4"].settings | {"rotation": "hadamard"}, "rotation"),
        (FORMS["awq-gemm"].settings | {"version": "exllama"}, "'exllama'.*gemm and gemv"),
        (FORMS["awq-gemm"].settings | {"bits": 8}, "8 bits"),
        (FORMS["fp8-block"].settings | {"fmt": "e3m4"}, "e3m4"),
        *(
            (FORMS["ct-int-channel"].settings | {"format": form}, form)
            for form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24", "dense")
        ),
        (
            FORMS["ct-int-channel"].settings | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        (FORMS["ct-int-channel"].settings | {"transform_config": {"a": 1}}, "transform_config"),
        (compressed("pack-quantized", "group", bits=3, block=[1, 32]).settings, "3 bits"),
        (compressed("pack-quantized", "tensor_group").settings, "tensor_group"),
    ],
)
def test_forms_that_cannot_be_read_are_refused_before_any_weight_is_read(
    settings: dict[str, Any], message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)  # and no weights
    set_settings(tmp_path, settings)
    source = find_model(str(tmp_path))
    for read in (load_config, open_checkpoint):
        with pytest.raises(UnsupportedModelError, match=f"(?s){message}.*GGUF file") as error:
            read(source)
        assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gptq-4", {"bits": None}, "bits None"),
        ("gptq-4", {"group_size": 0}, "group_size 0"),
        ("gptq-4", {"desc_act": "yes"}, "desc_act 'yes'"),
        ("fp8-block", {"weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ("ct-int-channel", {"config_groups": [1]}, "config_groups"),
        ("ct-int-channel", {"config_groups": {"W8A8": ["Linear"]}}, "W8A8"),
        ("ct-int-channel", {"ignore": ["re:("]}, "ignore"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    form: str, changes: dict[str, Any], message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    set_settings(tmp_path, FORMS[form].settings | changes)
    with pytest.raises(ModelLoadError, match=message) as error:
        load_config(find_model(str(tmp_path)))
    assert str(tmp_path / "config.json") in str(error.value)


def missing(tensor: Tensor) -> None:
    """The damage of a tensor that is not there."""


@pytest.mark.parametrize(
    ("form", "part", "damage", "message"),
    [
        ("gptq-4", "scales", missing, "scales' is missing"),
        ("gptq-4", "qzeros", missing, "qzeros' is missing"),
        ("gptq-4", "qzeros", lambda t: t[:1], r"qzeros' has shape \(1, 8\).*\(2, 8\)"),
        ("gptq-4", "scales", lambda t: t[:, 1:], "scales' has shape"),
        ("gptq-4", "qweight", lambda t: t.short(), "qweight' has dtype torch.int16"),
        ("gptq-4", "qweight", lambda t: t[0], "qweight' has shape"),
        ("gptq-4", "qweight", lambda t: t[:, :32], "scales' has shape"),
        ("gptq-4", "g_idx", lambda t: t + 1, "g_idx' names groups 1 to 2"),
        ("gptq-4", "g_idx", lambda t: t - 1, "g_idx' names groups -1 to 0"),
        ("gptq-4-act-order", "g_idx", missing, "g_idx' is missing"),
        ("awq-gemm", "scales", missing, "scales' is missing"),
        ("awq-gemm", "qzeros", lambda t: t[:, 1:], "qzeros' has shape"),
        ("awq-gemm", "qweight", lambda t: t[:40], "40 inputs.*group size 32"),
        ("awq-gemv", "qzeros", lambda t: t[1:], "qzeros' has shape"),
        ("fp8-tensor", "weight_scale", missing, "float8_e4m3fn.*weight_scale"),
        ("fp8-channel", "weight_scale", lambda t: t[1:], "weight_scale' has shape"),
        ("fp8-block", "weight_scale_inv", lambda t: t[1:], "weight_scale_inv' has shape"),
        ("fp8-block", "weight_scale_inv", lambda t: t.int(), "has dtype torch.int32"),
        ("fp8-tensor", "weight", lambda t: t.to(torch.bfloat16), "weight' has dtype"),
        ("ct-pack-4-group", "weight_scale", missing, "weight_scale' is missing"),
        ("ct-pack-4-group", "weight_shape", missing, "weight_shape' is missing"),
        ("ct-pack-4-group", "weight_shape", lambda t: t + 8, "weight_packed' has shape"),
        ("ct-pack-4-group", "weight_shape", lambda t: -t, "weight_shape' says"),
        ("ct-pack-4-asymmetric", "weight_zero_point", missing, "is missing"),
        ("ct-pack-4-asymmetric", "weight_zero_point", lambda t: t[1:], "has shape"),
        ("ct-pack-4-act-order", "weight_g_idx", lambda t: t * 9, "names groups"),
        ("ct-int-channel", "weight_scale", missing, "torch.int8.*weight_scale"),
    ],
)
def test_damaged_linears_are_named_with_their_file(
    form: str,
    part: str,
    damage: Callable[[Tensor], Tensor | None],
    message: str,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    packed, _ = quantized(FORMS[form], tiny_llama_dir, tmp_path)
    name = f"{LINEAR}.{part}"
    change(packed, {name: damage(load_file(packed / WEIGHTS)[name])})
    with pytest.raises(ModelLoadError, match=message) as error:
        logits(packed)
    assert str(packed) in str(error.value)
    assert LINEAR in str(error.value)


def test_a_weight_of_another_shape_than_the_models_is_named(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    packed, _ = quantized(FORMS["ct-int-channel"], tiny_llama_dir, tmp_path)
    with (
        open_checkpoint(find_model(str(packed))) as checkpoint,
        pytest.raises(ModelLoadError, match=r"q_proj.weight' has shape \(64, 64\).*\(64, 32\)"),
    ):
        checkpoint.get(Q_PROJ, (64, 32))


def test_packed_weights_without_settings_say_what_to_add(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    packed, _ = quantized(FORMS["gptq-4"], tiny_llama_dir, tmp_path)
    set_settings(packed, None)
    with pytest.raises(ModelLoadError, match=r"qweight.*quantize_config\.json") as error:
        open_checkpoint(find_model(str(packed)))
    assert str(packed) in str(error.value)


def test_a_weight_that_is_stored_twice_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    packed, _ = quantized(FORMS["gptq-4"], tiny_llama_dir, tmp_path)
    change(packed, {Q_PROJ: torch.zeros(64, 64)})
    with pytest.raises(ModelLoadError, match=rf"{Q_PROJ}.*and, as {LINEAR}.qweight"):
        open_checkpoint(find_model(str(packed)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"ignore": ["re:.*q_proj"]}, "ignore list"), ({"targets": ["Conv1d"]}, "targets")],
)
def test_settings_that_contradict_the_tensors_are_refused(
    changes: dict[str, Any], message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    form = FORMS["ct-int-channel"]
    packed, _ = quantized(form, tiny_llama_dir, tmp_path)
    group = form.settings["config_groups"]["group_0"] | changes
    set_settings(packed, form.settings | changes | {"config_groups": {"group_0": group}})
    with (
        open_checkpoint(find_model(str(packed))) as checkpoint,
        pytest.raises(ModelLoadError, match=message) as error,
    ):
        checkpoint.get(Q_PROJ)
    assert f"{LINEAR}.weight_scale" in str(error.value)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut"])
def test_headers_tell_which_part_keeps_a_weight_from_being_read(
    form: Form, cut: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The truth is reading itself; a part that reading does without may be missing."""
    made = form.make(64, 160, torch.Generator().manual_seed(0))
    stored = {f"{LINEAR}.{part}": one for part, one in made.stored.items()}
    beside = [name for name in stored if name.rpartition(".")[2] in BESIDE]
    assert beside
    for number, name in enumerate(beside):
        changed = stored | {name: stored[name].flatten()[: stored[name].numel() // 2 + 1][None]}
        if not cut:
            del changed[name]
        # A second linear, so that the form is seen where the first has lost its mark.
        changed |= {one.replace("q_proj", "k_proj"): kept.clone() for one, kept in stored.items()}
        folder = write(tmp_path / f"{number}", tiny_llama_dir, changed, form.settings)
        with open_checkpoint(find_model(str(folder))) as checkpoint:
            told = {one.stored for one in checkpoint.misfits([Q_PROJ, K_PROJ])}
            try:
                checkpoint.get(Q_PROJ, (64, 160))
            except ModelLoadError:
                assert told == {name}
            else:
                assert not told, name


def test_all_lost_parts_are_named_together_before_any_is_read(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    packed, _ = quantized(FORMS["awq-gemm"], tiny_llama_dir, tmp_path)
    lost = [
        name for name in load_file(packed / WEIGHTS) if ".layers.1." in name and "scales" in name
    ]
    change(packed, dict.fromkeys(lost))
    source = find_model(str(packed))
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(ModelLoadError, match=r"7 tensors of AWQ weights are missing") as caught,
    ):
        require_tensors(checkpoint, load_config(source))
    assert lost[0].rpartition(".")[2] in str(caught.value)
    assert "the download may be incomplete" in str(caught.value)


def test_small_floats_without_scales_are_known_by_their_dtype(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    form = next(form for form in FORMS.values() if form.settings["quant_method"] == "fp8")
    packed, _ = quantized(form, tiny_llama_dir, tmp_path)
    change(packed, {name: None for name in load_file(packed / WEIGHTS) if "scale" in name})
    source = find_model(str(packed))
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(ModelLoadError, match=r"14 tensors of FP8 .* missing .*\.weight_scale"),
    ):
        require_tensors(checkpoint, load_config(source))
