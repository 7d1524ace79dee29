"""GGUF files are read as what they hold, and refused with a useful message."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGML
from gguf_models import tiny_model, weights_of

from minserve.errors import ModelLoadError
from minserve.models.gguf_files.gguf_file import GGUFFile
from shared.reference_models.gguf_writer import write_gguf

STRING, ARRAY, UINT8, INT32 = 8, 9, 0, 5


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(num_tensors: int = 0, num_values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (GGML.F32, 0.0),
        (GGML.F16, 1e-3),
        (GGML.BF16, 1e-2),
        (GGML.Q8_0, 1e-2),
        (GGML.Q4_0, 0.2),
        (GGML.Q4_1, 0.1),
        (GGML.Q5_1, 0.05),
    ],
)
def test_quantized_weights_are_near_the_original(model, tmp_path, kind, tolerance):
    file = GGUFFile(write_gguf(model, tmp_path / "m.gguf", weights=kind))
    head = weights_of(model)["lm_head.weight"]
    assert (file.read("output.weight") - head).abs().max() <= tolerance * head.abs().max()


def test_joined_rows_dequantize_to_the_same_bits(model, tmp_path):
    file = write_gguf(model, tmp_path / "m.gguf", weights=GGML.Q4_1)
    [plain] = [t for t in gguf.GGUFReader(file).tensors if t.name == "output.weight"]
    expected = gguf.quants.dequantize(plain.data, plain.tensor_type)
    assert np.array_equal(GGUFFile(file).read("output.weight").numpy(), expected)


def test_all_kinds_of_values_are_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = {
        "a.flag": True,
        "a.text": "Grüße 東京",
        "a.number": 2**40,
        "a.words": ["one", "", "three"],
        "a.numbers": [1, -2, 3],
        "a.halves": [0.5, -1.5],
    }
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", values["a.text"])
    writer.add_uint64("a.number", values["a.number"])
    for key in ("a.words", "a.numbers", "a.halves"):
        writer.add_array(key, values[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUFFile(tmp_path / "m.gguf").metadata
    assert read == {"general.architecture": "llama", **values}


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 1000, -1, -40000])
def test_a_file_cut_short_is_named(model, tmp_path, keep):
    file = write_gguf(model, tmp_path / "cut.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        GGUFFile(file)


@pytest.mark.parametrize(
    "data",
    [
        header(num_tensors=2**60),
        header(num_values=2**60),
        header(num_values=1) + text("a") + struct.pack("<IIQ", ARRAY, UINT8, 2**60),
        header(num_values=1) + text("a") + struct.pack("<IIQ", ARRAY, INT32, 2**63),
        header(num_values=1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, 2**60),
        # Empty strings, as many as fit: more than the file can hold are not even begun.
        header(num_values=1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, 2**60) + bytes(2**22),
        header(num_values=1) + text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 2**60),
        header(num_values=1) + text("a") + struct.pack("<IQ", STRING, 2**60),
        header(num_values=1) + struct.pack("<Q", 2**64 - 1) + b"name",
        header(num_tensors=1) + text("a") + struct.pack("<I", 2**32 - 1) + bytes(64),
        header(num_tensors=1) + text("a") + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0),
        header(num_tensors=1) + text("a") + struct.pack("<IQIQ", 1, 32, 0, 2**64 - 32),
        header(num_tensors=1) + text("a") + struct.pack("<IQIQ", 1, 32, 255, 0),
    ],
)
def test_a_claimed_size_that_cannot_be_fails_without_memory(tmp_path, data):
    file = tmp_path / "hostile.gguf"
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ModelLoadError, match=r"hostile\.gguf"):
        GGUFFile(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("alignment", [0, -32, 7.5, "wide"])
def test_an_alignment_that_cannot_be_is_refused(model, tmp_path, alignment):
    file = write_gguf(model, tmp_path / "m.gguf", metadata={"general.alignment": 32})
    kinds = {int: (5, "<i"), float: (6, "<f")}
    code, layout = kinds.get(type(alignment), (8, ""))
    value = struct.pack(layout, alignment) if layout else text(alignment)
    good = text("general.alignment") + struct.pack("<II", 4, 32)
    bad = text("general.alignment") + struct.pack("<I", code) + value
    assert good in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(good, bad))
    with pytest.raises(ModelLoadError, match=r"m\.gguf"):
        GGUFFile(file)


def test_any_flipped_header_byte_never_crashes(model, tmp_path):
    """Whatever is broken, the caller sees a ModelLoadError or a readable file."""
    good = write_gguf(model, tmp_path / "good.gguf").read_bytes()
    file = tmp_path / "bad.gguf"
    refusals = []
    for position in range(0, 1200, 7):
        file.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        try:
            read = GGUFFile(Path(file))
            for name in read.tensors:
                read.read(name)
        except ModelLoadError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert all("bad.gguf" in message for message in refusals)
