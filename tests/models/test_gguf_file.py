"""GGUF files are read as the weights they hold, and refused with a useful message."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import HEADS, KV_HEADS, NORM, Q_PROJ, assert_reads_all, weights_of
from gguf import GGMLQuantizationType as GGML
from gguf.quants import quantize

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models import gguf_checkpoint
from minserve.models.gguf_file import GGUFFile
from minserve.models.loader import open_checkpoint
from minserve.models.source import find_model, load_config


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's row order to GGUF's, as llama.cpp's converter does it."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    state: dict[str, torch.Tensor],
    *,
    arch: str = "llama",
    types: dict[str, GGML] | None = None,
    metadata: dict[str, float | int | str] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """A llama GGUF file with these Hugging Face weights."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    names = {hf: g for g, hf in gguf_checkpoint._GGUF_NAMES.items()}
    for name, tensor in state.items():
        stem, _, suffix = name.rpartition(".")
        parts = stem.split(".", 3)
        if stem in names:
            name_there = names[stem]
        else:
            [part] = [g for g, hf in gguf_checkpoint._GGUF_LAYER_NAMES.items() if hf == parts[3]]
            name_there = f"blk.{parts[2]}.{part}"
        values = tensor.float().numpy()
        for part, heads in ((".attn_q", HEADS), (".attn_k", KV_HEADS)):
            values = permuted(values, heads) if name_there.endswith(part) else values
        kind = (types or {}).get(name, GGML.F32)
        writer.add_tensor(f"{name_there}.{suffix}", quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_float32_gives_the_original_weights(tiny_llama_dir, tmp_path):
    state = weights_of(tiny_llama_dir)
    file = write_gguf(tmp_path / "tiny.gguf", state)
    assert_reads_all(file, state)
    config = load_config(find_model(str(file)))
    assert config.hidden_size == 64
    assert config.head_dim == 16
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert config.vocab_size == 512
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings is False
    assert (config.bos_token_id, config.eos_token_id) == (1, [2])


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (GGML.F16, 1e-3),
        (GGML.BF16, 1e-2),
        (GGML.Q8_0, 1e-2),
        (GGML.Q4_0, 0.2),
        (GGML.Q4_1, 0.1),
        (GGML.Q5_1, 0.05),
    ],
)
def test_gguf_quantized_weights_are_near_the_original(tiny_llama_dir, tmp_path, kind, tolerance):
    state = weights_of(tiny_llama_dir)
    quantized = {name: kind for name, tensor in state.items() if tensor.dim() == 2}
    file = write_gguf(tmp_path / "tiny.gguf", state, types=quantized)
    with open_checkpoint(find_model(str(file))) as ckpt:
        for name, tensor in state.items():
            error = (ckpt.get(name, tuple(tensor.shape)) - tensor).abs().max()
            assert error <= tolerance * tensor.abs().max(), name


def test_gguf_joined_rows_dequantize_to_the_same_bits(tiny_llama_dir, tmp_path):
    state = weights_of(tiny_llama_dir)
    file = write_gguf(tmp_path / "t.gguf", state, types={"lm_head.weight": GGML.Q4_1})
    [plain] = [t for t in gguf.GGUFReader(file).tensors if t.name == "output.weight"]
    expected = gguf.quants.dequantize(plain.data, plain.tensor_type)
    assert np.array_equal(GGUFFile(file).read("output.weight").numpy(), expected)


def test_gguf_without_a_head_is_tied(tiny_llama_dir, tmp_path):
    state = {k: v for k, v in weights_of(tiny_llama_dir).items() if k != "lm_head.weight"}
    source = find_model(str(write_gguf(tmp_path / "tied.gguf", state)))
    assert load_config(source).tie_word_embeddings is True
    assert "lm_head.weight" not in open_checkpoint(source).names()


def test_gguf_rope_scalings(tiny_llama_dir, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    state = weights_of(tiny_llama_dir)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = write_gguf(tmp_path / "linear.gguf", state, metadata=linear)
    rope = load_config(find_model(str(file))).rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=16, rope_parameters=llama3, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    file = write_gguf(tmp_path / "llama3.gguf", state, extra=factors)
    assert load_config(find_model(str(file))).rope_parameters == llama3
    assert_reads_all(file, state)

    other = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    file = write_gguf(tmp_path / "other.gguf", state, extra=other)
    with pytest.raises(UnsupportedModelError, match=r"other\.gguf.*rope_freqs\.weight"):
        load_config(find_model(str(file)))


@pytest.mark.parametrize(
    ("arch", "metadata", "message"),
    [
        ("gemma9", {}, "gemma9"),
        ("llama", {"llama.expert_count": 8}, "experts"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "yarn"),
        ("llama", {"llama.rope.dimension_count": 8}, "rope.dimension_count 8"),
    ],
)
def test_gguf_variants_that_are_not_implemented(tiny_llama_dir, tmp_path, arch, metadata, message):
    file = tmp_path / "odd.gguf"
    write_gguf(file, weights_of(tiny_llama_dir), arch=arch, metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=rf"odd\.gguf.*{message}"):
        load_config(find_model(str(file)))


def test_gguf_without_a_needed_value_names_it(tiny_llama_dir, tmp_path):
    file = write_gguf(tmp_path / "t.gguf", weights_of(tiny_llama_dir))
    # Same length, so that the rest of the file stays in its place.
    file.write_bytes(file.read_bytes().replace(b"llama.block_count", b"llama.block_cuont"))
    with pytest.raises(ModelLoadError, match=r"t\.gguf.*llama\.block_count"):
        load_config(find_model(str(file)))


def test_gguf_of_integers_names_the_tensor(tiny_llama_dir, tmp_path):
    state = weights_of(tiny_llama_dir)
    del state[NORM]
    extra = {"output_norm.weight": np.ones(64, np.int32)}
    file = write_gguf(tmp_path / "t.gguf", state, extra=extra)
    with (
        open_checkpoint(find_model(str(file))) as ckpt,
        pytest.raises(ModelLoadError, match=r"t\.gguf: tensor 'output_norm\.weight'.*I32"),
    ):
        ckpt.get(NORM, (64,))


def test_gguf_shapes_are_checked_also_where_rows_cannot_be_unpermuted(tiny_llama_dir, tmp_path):
    state = weights_of(tiny_llama_dir)
    state[Q_PROJ] = torch.ones(HEADS * 3, 64)
    writer_state = {k: v for k, v in state.items() if k != Q_PROJ}
    extra = {"blk.0.attn_q.weight": state[Q_PROJ].numpy()}
    file = write_gguf(tmp_path / "t.gguf", writer_state, extra=extra)
    with (
        open_checkpoint(find_model(str(file))) as ckpt,
        pytest.raises(ModelLoadError, match=rf"t\.gguf.*{Q_PROJ}.*\(12, 64\).*\(64, 64\)"),
    ):
        ckpt.get(Q_PROJ, (64, 64))


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 1000, -1, -40000])
def test_gguf_cut_short_is_named(tiny_llama_dir, tmp_path, keep):
    file = write_gguf(tmp_path / "cut.gguf", weights_of(tiny_llama_dir))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        open_checkpoint(find_model(str(file)))


def test_gguf_with_any_flipped_header_byte_never_crashes(tiny_llama_dir, tmp_path):
    """Whatever is broken, the caller sees a ModelLoadError or a readable file."""
    good = write_gguf(tmp_path / "good.gguf", weights_of(tiny_llama_dir)).read_bytes()
    file = tmp_path / "bad.gguf"
    refusals = []
    for position in range(0, 1200, 7):
        file.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        try:
            open_checkpoint(find_model(str(file)))
        except ModelLoadError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert all("bad.gguf" in message for message in refusals)
