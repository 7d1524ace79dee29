"""``minserve inspect``: what a model is and whether it would be served, before its weights are read."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from minserve.cli.flags import add_config_flags, given
from minserve.config import EngineConfig
from minserve.exit_codes import EXIT_USAGE

if TYPE_CHECKING:
    from minserve.engine.inspection import Inspection

_FLAGS = ("tokenizer", "chat_template", "dtype", "quantization", "device", "max_model_len")
_EXAMPLES = """\
examples:
  minserve inspect ./Llama-3.2-1B
  minserve inspect ./model.gguf --max-model-len 8192
  minserve inspect ./Llama-3.2-1B --quantization int8 --json

The exit code is 0 if minserve serve would serve the model with the same flags, and 2 if not; the
reason is the last line. No model is downloaded: a hub id is looked for in the cache.
"""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what is this model, and would it be served?",
        description="Tell what a model is, what it takes to serve it, and what would keep it from "
        "being served, without reading its weights.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="as for minserve serve --model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    others = tuple(field.name for field in fields(EngineConfig) if field.name not in _FLAGS)
    add_config_flags(parser, EngineConfig, leave_out=others)
    parser.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    """Look at the model and print the report."""
    config = EngineConfig.create(**given(args, EngineConfig))
    logging.getLogger().setLevel(logging.ERROR)  # what matters is part of the report

    from minserve.engine.inspection import inspect_model

    found = inspect_model(config)
    if args.json:
        report = {**found.facts, "warnings": found.warnings, "problems": found.problems}
        print(json.dumps({"served": not found.problems, **report}, ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    return EXIT_USAGE if found.problems else 0


def _lines(found: Inspection) -> Iterable[str]:
    """Yield the report for people."""
    rows = [row for section, show in _SECTIONS.items() if section in found.facts
            for row in show(found.facts[section])]  # fmt: skip
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        yield f"{name:<{width}}  {value}"
    if rows:
        yield ""
    for warning in found.warnings:
        yield f"warning: {warning}"
    for problem in found.problems:
        yield f"would not be served: {problem}"
    if not found.problems:
        yield "would be served"


Rows = Iterable[tuple[str, str]]


def _model_rows(facts: dict[str, Any]) -> Rows:
    yield "model", facts["name"]
    yield "path", facts["path"]
    if "form" in facts:
        count = len(facts["files"])
        files = f"{count} files" if count > 1 else "1 file"
        yield "form", f"{facts['form']}, {files}, {_size(facts['size'])}"


def _architecture_rows(facts: dict[str, Any]) -> Rows:
    yield "type", facts["model_type"]
    yield (
        "layers",
        f"{facts['layers']}, hidden size {facts['hidden_size']}, {facts['heads']} heads of "
        f"{facts['head_size']}, {facts['kv_heads']} KV heads",
    )
    tied = ", tied to the head" if facts["tied_embeddings"] else ""
    yield "vocabulary", f"{facts['vocabulary']:,} embeddings{tied}"
    served, most = facts["context_served"], facts["context_at_most"]
    context = f"{served:,} tokens"
    if facts["rope_type"] not in (None, "default"):
        context += f", RoPE {facts['rope_type']} over {facts['context']:,}"
    if most != served:
        context += f"; up to {most:,} with --max-model-len"
    if facts["sliding_window"] is not None:
        context += f"; sliding window of {facts['sliding_window']:,}, which is the limit here"
    yield "context", context


def _weights_rows(facts: dict[str, Any]) -> Rows:
    stored = facts["stored"]
    total = sum(stored.values())
    parts = [f"{name} {n / total:.0%}" for name, n in stored.items() if n >= 0.005 * total]
    count = facts.get("parameters", total)
    yield "parameters", f"{_number(count)} ({count:,})"
    yield "stored as", parts[0].split()[0] if len(parts) == 1 else ", ".join(parts)


def _tokenizer_rows(facts: dict[str, Any]) -> Rows:
    yield "tokenizer", f"{facts['kind']}, {facts['vocabulary']:,} tokens"
    names = facts["chat_templates"]
    if facts["chat_template"]:
        chat = "one" if len(names) == 1 else f"{len(names)}: {', '.join(names)}"
    elif names:
        chat = f"choose one with --chat-template: {', '.join(names)}"
    else:
        chat = "none: chats are refused, completions are served"
    yield "chat template", chat
    stops = [f"{one['id']} {one['text']!r}" for one in facts["stop_tokens"]]
    yield "stop tokens", ", ".join(stops) or "none"


def _defaults_rows(facts: dict[str, Any]) -> Rows:
    if facts:
        yield "sampling", ", ".join(f"{name} {value}" for name, value in facts.items())


def _run_rows(facts: dict[str, Any]) -> Rows:
    yield (
        "would run as",
        f"{facts['dtype']} on {facts['device']}, weights {facts['weight_format']}, sequences of up "
        f"to {facts['max_model_len']:,} tokens",
    )


def _memory_rows(facts: dict[str, Any]) -> Rows:
    yield (
        "memory",
        f"weights {_size(facts['weights'])}, of {_size(facts['free'])} that are free now",
    )
    yield (
        "KV cache",
        f"{_size(facts['kv_per_token'])} a token, {_size(facts['kv_per_sequence'])} for the longest "
        "sequence",
    )


_SECTIONS = {
    "model": _model_rows,
    "architecture": _architecture_rows,
    "weights": _weights_rows,
    "tokenizer": _tokenizer_rows,
    "sampling_defaults": _defaults_rows,
    "runs_as": _run_rows,
    "memory": _memory_rows,
}


def _size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it, such as ``93.1 MiB``."""
    for unit in _UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 1000 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} {_UNITS[-1]}"


def _number(count: int) -> str:
    """Return a number of parameters as people say it, such as ``135M``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
