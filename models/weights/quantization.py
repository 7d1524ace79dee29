"""The settings of quantized weights: `read_quantization` finds and checks them.

They are in config.json, or for old GPTQ folders in quantize_config.json. What cannot be read is
refused here, before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.json_file import read_json
from minserve.models.weights.compressed_tensors import STRATEGIES, CompressedTensorsFormat, Scheme
from minserve.models.weights.packed_formats import AwqFormat, Fp8Format, GptqFormat, PackedFormat

KEYS = ("quantization_config", "compression_config")
GPTQ_FILE = "quantize_config.json"
WHAT_TO_DO = "use the unquantized model or a GGUF file"
ACTIVATIONS = "activations are not quantized"
KV_CACHE = "the KV cache is not quantized"
GPTQ_BITS = PACKED_BITS = (2, 4, 8)
# Settings of GPTQModel under which weights alone do not make the model.
GPTQ_BESIDE_WEIGHTS = ("rotation", "adapter")
COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)


def read_quantization(folder: Path, config: Mapping[str, Any] | None = None) -> PackedFormat | None:
    """Return the form of a folder's quantized weights; ``None`` if none are quantized.

    ``config``: what is in the folder's config.json, if it has been read.

    Raises:
        UnsupportedModelError: if minserve cannot read that form.
        ModelLoadError: if a setting is missing or makes no sense.
    """
    path = folder / "config.json"
    if config is None:
        config = read_json(path) if path.is_file() else {}
    places: list[Mapping[str, Any]] = [config]
    if isinstance(config.get("text_config"), dict):
        places.append(config["text_config"])
    for place in places:
        for key in KEYS:
            if place.get(key):
                return _Settings(path, key, place[key]).format()
    path = folder / GPTQ_FILE
    if path.is_file():
        return _Settings(path, "", {"quant_method": "gptq"} | read_json(path)).format()
    return None


@dataclass(frozen=True)
class _Settings:
    """An object of settings, and its place for messages.

    Attributes:
        path: the file.
        key: where in the file, empty for the whole file.
    """

    path: Path
    key: str
    values: Any

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            raise ModelLoadError(f"{self.path}: {self.key} holds {self.values!r} and no object")

    def format(self) -> PackedFormat:
        method = self.values.get("quant_method")
        readers = {
            "compressed-tensors": self._compressed_tensors,
            "awq": self._awq,
            "gptq": self._gptq,
            "fp8": self._fp8,
            "fbgemm_fp8": self._fp8,
        }
        if not isinstance(method, str) or method.lower() not in readers:
            self.refuse(
                f"weights quantized by {method!r}",
                "minserve reads compressed-tensors, AWQ, GPTQ and FP8",
            )
        return readers[method.lower()]()

    # ------------------------------------------------------------------------------- reading

    def refuse(self, what: str, why: str = "") -> NoReturn:
        """Raise an error that says what is not supported, and what to do."""
        why = f" ({why})" if why else ""
        raise UnsupportedModelError(f"{self._where}: {what} cannot be read{why}; {WHAT_TO_DO}")

    def wrong(self, name: str) -> NoReturn:
        """Raise an error about a setting that is missing or makes no sense."""
        raise ModelLoadError(f"{self._where}: {name} {self.values.get(name)!r} makes no sense")

    @property
    def _where(self) -> str:
        return f"{self.path}: {self.key}" if self.key else str(self.path)

    def word(self, *names: str, default: str) -> str:
        """Return the first of these settings that is there, in small letters."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return value.lower() if isinstance(value, str) else self.wrong(name)
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        return value if isinstance(value, bool) else self.wrong(name)

    def bits(self, name: str, known: tuple[int, ...]) -> int:
        value = self.values.get(name)
        if not _is_int(value):
            self.wrong(name)
        if value not in known:
            self.refuse(f"weights of {value} bits", f"bits may be {_words(known)}")
        return int(value)

    def group_size(self, *names: str) -> int:
        """Return a group's size: above 0, or -1 for a group of all inputs."""
        name = next((one for one in names if one in self.values), names[0])
        value = self.values.get(name)
        if not _is_int(value) or (value < 1 and value != -1):
            self.wrong(name)
        return int(value)

    def pair(self, name: str) -> tuple[int, int]:
        value = self.values.get(name)
        if isinstance(value, str):  # "128x128"
            value = [int(one) if one.isdecimal() else 0 for one in value.split("x")]
        if not isinstance(value, list) or len(value) != 2:
            self.wrong(name)
        if not all(_is_int(one) and one > 0 for one in value):
            self.wrong(name)
        return value[0], value[1]

    def within(self, name: str, key: str) -> _Settings:
        """Return the settings under a name, which is called ``key`` in messages."""
        return _Settings(self.path, f"{self.key}.{key}", self.values.get(name))

    # --------------------------------------------------------------------------- the formats

    def _gptq(self) -> GptqFormat:
        form = self.word("checkpoint_format", "format", default="gptq")
        if self.values.get("is_marlin_format"):
            form = "marlin"
        if form not in ("gptq", "gptq_v2"):
            self.refuse(f"GPTQ weights in the format {form!r}", "formats are gptq and gptq_v2")
        if self.word("pack_dtype", default="int32") != "int32":
            self.refuse(f"GPTQ weights packed in {self.values['pack_dtype']}")
        for name in GPTQ_BESIDE_WEIGHTS:
            if self.values.get(name):
                self.refuse(f"GPTQ weights with {name}")
        rules = self.values.get("dynamic") or {}
        # A rule that begins with "-:" leaves linears as they are, which their tensors show.
        if not isinstance(rules, dict) or not all(rule.startswith("-:") for rule in rules):
            self.refuse("GPTQ weights with settings of their own for some linears", "dynamic")
        return GptqFormat(
            bits=self.bits("bits", GPTQ_BITS),
            group_size=self.group_size("group_size"),
            act_order=self.flag("desc_act", False),
            zeros_less_one=form == "gptq",
        )

    def _awq(self) -> AwqFormat:
        version = self.word("version", "checkpoint_format", "format", default="gemm")
        if version not in ("gemm", "gemv"):
            self.refuse(f"AWQ weights of version {version!r}", "versions are gemm and gemv")
        self.bits("w_bit" if "w_bit" in self.values else "bits", (4,))
        return AwqFormat(self.group_size("group_size", "q_group_size"), version)

    def _fp8(self) -> Fp8Format:
        form = self.word("fmt", "format", default="e4m3")
        if form not in ("e4m3", "e5m2", "fp8", "float8_e4m3fn", "float8_e5m2"):
            self.refuse(f"8 bit floats of the format {form!r}")
        if self.values.get("weight_block_size") is None:
            return Fp8Format(None)
        return Fp8Format(self.pair("weight_block_size"))

    def _compressed_tensors(self) -> CompressedTensorsFormat:
        form = self.word("format", default="")
        if form not in COMPRESSED_FORMATS:
            self.refuse(
                f"compressed-tensors weights in the format {form!r}",
                f"formats are {_words(COMPRESSED_FORMATS)}",
            )
        sparsity = self.values.get("sparsity_config") or {}
        if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
            self.refuse(f"sparse weights ({sparsity})", "sparsity_config")
        if self.values.get("transform_config"):
            self.refuse("weights that belong to transformed activations", "transform_config")
        groups = self.within("config_groups", "config_groups")
        schemes, notes = [], []
        for name in groups.values:
            group = groups.within(name, name)
            if group.values.get("weights"):
                schemes.append(group._scheme())
            if group.values.get("input_activations") and ACTIVATIONS not in notes:
                notes.append(ACTIVATIONS)
        if not schemes:
            self.refuse("settings with no config group that quantizes weights")
        if self.values.get("kv_cache_scheme"):
            notes.append(KV_CACHE)
        ignore = self.names("ignore")
        return CompressedTensorsFormat(f"compressed-tensors {form}", schemes, ignore, notes)

    def names(self, name: str) -> tuple[str, ...]:
        """Return a list of names and patterns of linears; the patterns are valid."""
        names = self.values.get(name) or []
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            self.wrong(name)
        for one in names:
            if one.startswith("re:"):
                try:
                    re.compile(one[3:])
                except re.error:
                    self.wrong(name)
        return tuple(names)

    def _scheme(self) -> Scheme:
        """Return the scheme of a config group of compressed-tensors."""
        form = self.word("format", default=COMPRESSED_FORMATS[0])
        if form not in COMPRESSED_FORMATS:
            self.refuse(f"compressed-tensors weights in the format {form!r}")
        weights = self.within("weights", "weights")
        kind = weights.word("type", default="int")
        if kind not in ("int", "float"):
            weights.wrong("type")
        size = weights.values.get("group_size")
        inferred = "tensor" if size is None else "channel" if size == -1 else "group"
        strategy = weights.word("strategy", default=inferred)
        if strategy not in STRATEGIES:
            weights.refuse(f"weights with the strategy {strategy!r}")
        block = None
        if strategy == "block":
            block = weights.pair("block_structure")
        elif strategy == "group":
            block = (1, weights.group_size("group_size"))
            if block[1] < 1:
                weights.wrong("group_size")
        actorder = weights.values.get("actorder")
        return Scheme(
            targets=self.names("targets"),
            bits=weights.bits("num_bits", (8,) if kind == "float" else PACKED_BITS),
            is_float=kind == "float",
            symmetric=weights.flag("symmetric", True),
            strategy=strategy,
            block=block,
            act_order=actorder is True or str(actorder).lower() in ("group", "dynamic"),
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _words(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
