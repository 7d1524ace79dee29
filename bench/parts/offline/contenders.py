"""The contenders of `offline.py`: minserve with its variants, and each peer with its setup."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gguf import GGUFReader

from minserve.workload.server_process import ServerCommand
from shared.children import script
from shared.contending_servers import export_with_tokenizer, our_variant, vllm_variant
from shared.peers import cores, gguf_of, llama_cpp_python, vllm_python

ENGINES = "parts/offline/engines.py"
QUANTIZATIONS = ("int8",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An engine with its settings, which is a column of the table.

    Attributes:
        label: name of the column.
        weights: words that describe its weights.
        command, env: command and environment of the process that measures it.
        server: the same engine as a server; ``None`` if that is not measured.
        skipped: rows for which it has no value, with the reason.
        quantization: quantization of a minserve's weights.
    """

    label: str
    weights: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    server: ServerCommand | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None


def minserve_contenders(
    model: str, dtype: str, quantizations: Sequence[str], repeats: int
) -> list[Contender]:
    """Return minserve with its defaults, then with each quantization of its weights."""
    return [_minserve(model, dtype, one, repeats) for one in (None, *quantizations)]


def _minserve(model: str, dtype: str, quantization: str | None, repeats: int) -> Contender:
    flags = [] if quantization is None else ["--quantization", quantization]
    label = "minserve" if quantization is None else f"minserve {quantization}"
    server = our_variant(model)
    command = script(
        sys.executable, ENGINES, "--engine", "minserve", "--model", model, "--dtype", dtype,
        "--repeats", str(repeats), *flags,
    )  # fmt: skip
    return Contender(
        label=label,
        weights=f"{model}, dtype {dtype}" if quantization is None else f"{model}, {quantization}",
        command=command,
        server=replace(server, label=label, command=[*server.command, "--dtype", dtype, *flags]),
        quantization=quantization,
    )


def vllm_contenders(model: str, python: str | None, dtype: str, repeats: int) -> list[Contender]:
    """Return vLLM with its defaults (it leaves a core to its front end), and with every core bound.

    Args:
        python: the interpreter of vLLM's environment; default: one that is made on first use.
        dtype: dtype of its weights.
    """
    python = python or vllm_python()
    folder = str(export_with_tokenizer(model, dtype))
    command = script(
        python, ENGINES, "--engine", "vllm", "--model", folder, "--dtype", dtype,
        "--repeats", str(repeats),
    )  # fmt: skip
    found = []
    for name, threads in (("default", None), ("all cores", ",".join(map(str, cores())))):
        label = f"vLLM {name}"
        server = vllm_variant(python, folder, dtype, None, threads)
        found.append(
            Contender(
                label=label,
                weights=f"{model}, exported in {dtype}",
                command=command,
                # Engine and server run under the same conditions.
                env=server.env,
                server=replace(server, label=label),
            )
        )
    return found


def llama_cpp_contender(model: str, repeats: int) -> Contender:
    """Return llama.cpp on the GGUF file as it is.

    Raises:
        SystemExit: if the model is no GGUF file, or if llama.cpp cannot be built.
    """
    file, no_server = gguf_of(model), "only its library is measured, not its server"
    command = script(
        llama_cpp_python(), ENGINES, "--engine", "llama.cpp", "--model", file,
        "--repeats", str(repeats),
    )  # fmt: skip
    return Contender(
        label="llama.cpp",
        weights=f"{model}, the GGUF file as it is ({tensor_types(file)})",
        command=command,
        skipped={
            "mixed_step": "its scheduler is its server's, which is not measured",
            "server_b32": no_server,
            "server_mixed": no_server,
        },
    )


def tensor_types(file: str) -> str:
    """Return the types of a GGUF file's matrices, the most common first."""
    found = Counter(
        tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1
    )
    return ", ".join(name for name, _ in found.most_common())
