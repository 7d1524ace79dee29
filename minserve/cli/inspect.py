"""``minserve inspect``: what a model is and whether it would be served, before its weights are read."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from minserve.cli.flags import add_config_flags, given
from minserve.config import EngineConfig
from minserve.errors import ConfigError
from minserve.exit_codes import EXIT_USAGE
from minserve.sampling_params import default_words

if TYPE_CHECKING:
    from minserve.engine.inspection import Inspection

_FLAGS = (
    *("tokenizer", "chat_template", "tool_format", "reasoning_format"),
    *("dtype", "quantization", "generation_config", "device"),
    *("max_model_len", "draft_model", "tensor_parallel", "kv_cache_dtype"),
)
_EXAMPLES = """\
examples:
  minserve inspect ./Llama-3.2-1B
  minserve inspect ./model.gguf --max-model-len 8192
  minserve inspect ./Llama-3.2-1B --quantization int8 --json
  minserve inspect ./opt-30b --tensor-parallel 4

The exit code is 0 if minserve serve would serve the model with the same flags, and 2 if not; the
reason is the last line. No model is downloaded: a hub id is looked for in the cache.
"""
_DEFAULT_TEMPLATE = "default"
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
    parser.add_argument("--model", action=_NoFlag, dest="no_flag", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    others = tuple(field.name for field in fields(EngineConfig) if field.name not in _FLAGS)
    add_config_flags(parser, EngineConfig, leave_out=others)
    parser.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    """Look at the model and print the report."""
    logging.getLogger().setLevel(logging.ERROR)  # what matters is part of the report

    from minserve.engine.inspection import Inspection, inspect_model

    try:
        found = inspect_model(EngineConfig.create(**given(args, EngineConfig)))
    except ConfigError as error:  # settings that no model could be served with
        found = Inspection(problems=[str(error)])
    if args.json:
        report = {**found.facts, "warnings": found.warnings, "problems": found.problems}
        print(json.dumps({"served": not found.problems, **report}, ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    return EXIT_USAGE if found.problems else 0


class _NoFlag(argparse.Action):
    """Tells whoever gives the model by the flag that the other commands have."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"give the model without --model: minserve inspect {shlex.quote(values)}")


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
    yield "chat template", _chat_words(facts["chat_templates"], facts["chat_template_given"])
    stops = [f"{one['id']} {one['text']!r}" for one in facts["stop_tokens"]]
    yield "stop tokens", ", ".join(stops) or "none"


def _chat_rows(facts: dict[str, Any]) -> Rows:
    tools = facts["tool_format"] or "none: tools are refused"
    if facts["tools_described"]:
        tools += ", described in a message: the chat template knows no tools"
    yield "tool format", tools
    thinking = facts["reasoning_format"] or "none: it marks no thinking"
    if facts["thinking_markers"] is not None:
        begin, end = facts["thinking_markers"]
        thinking += f": {begin} ... {end}"
        if not facts["thinking_separated"]:
            thinking += ", left in the text by --reasoning-format none"
    yield "thinking", thinking


def _chat_words(names: list[str], given: str | None) -> str:
    """Return which chat template is used, of the model's own by name or the one given."""
    if given is not None:
        return f"{given}, by --chat-template"
    if not names:
        return "none: chats are refused, completions are served; --chat-template FILE gives one"
    if len(names) == 1:
        return "the model's own"
    if _DEFAULT_TEMPLATE not in names:
        return f"choose one with --chat-template: {', '.join(names)}"
    return f"the model's own: {', '.join(names)}"


def _defaults_rows(facts: dict[str, Any]) -> Rows:
    if facts:
        yield "sampling", default_words(facts)


def _run_rows(facts: dict[str, Any]) -> Rows:
    yield (
        "would run as",
        f"{facts['dtype']} on {facts['device']}, weights {facts['weight_format']}, sequences of up "
        f"to {facts['max_model_len']:,} tokens",
    )


def _draft_rows(facts: dict[str, Any]) -> Rows:
    yield "draft model", f"{facts['name']}, {_number(facts['parameters'])} parameters"


def _memory_rows(facts: dict[str, Any]) -> Rows:
    forms = " (two forms, for speed)" if facts["weight_forms"] > 1 else ""
    each = f"on each of {facts['ranks']} ranks: " if facts["ranks"] > 1 else ""
    yield (
        "memory",
        f"{each}weights {_size(facts['weights'])}{forms}, of {_size(facts['free'])} that are free now",
    )
    yield (
        "KV cache",
        f"{each}{_size(facts['kv_per_token'])} a token, {_size(facts['kv_per_sequence'])} for the longest "
        "sequence",
    )


_SECTIONS = {
    "model": _model_rows,
    "architecture": _architecture_rows,
    "weights": _weights_rows,
    "tokenizer": _tokenizer_rows,
    "chats": _chat_rows,
    "sampling_defaults": _defaults_rows,
    "runs_as": _run_rows,
    "memory": _memory_rows,
    "draft_model": _draft_rows,
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
