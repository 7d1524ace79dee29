"""Command line flags made from the config dataclasses, so that each flag is written once.

A flag that is not given is absent from the parsed namespace: the defaults live in the
dataclasses alone.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from minserve.errors import InvalidRequestError
from minserve.sampling_params import SamplingParams
from minserve.structure import Structure

# `SamplingParams` explains its fields at length; these are their short forms.
_SAMPLING_HELP = {
    "n": "how many independent outputs",
    "max_tokens": "most output tokens",
    "min_tokens": "fewest output tokens before the output may end",
    "temperature": "0 always takes the most likely token",
    "top_p": "sample among the most likely tokens with this total probability",
    "top_k": "sample among the k most likely tokens; 0 for all",
    "min_p": "drop tokens less likely than this times the most likely one",
    "seed": "make sampled output reproducible",
    "presence_penalty": "lower the logit of a token that was generated",
    "frequency_penalty": "lower a token's logit for each time it was generated",
    "repetition_penalty": "above 1, make tokens of prompt and output less likely",
    "logit_bias": "add to a token's logit, as ID=NUMBER; may be given several times",
    "allowed_token_ids": "token id that may be sampled, and only those; several times",
    "bad_words": "string that the output never holds; may be given several times",
    "stop": "string that ends the output; may be given several times",
    "include_stop_str_in_output": "leave the stop string in the text",
    "stop_token_ids": "token id that ends the output; may be given several times",
    "ignore_eos": "go on after the model's end-of-sequence token",
    "logprobs": "with --json, report this many alternatives per output token",
    "prompt_logprobs": "with --json, the same for the prompt's tokens",
    "skip_special_tokens": "leave special tokens out of the text",
    "preserved_tokens": "special token that stays in the text; may be given several times",
    "structure": "form of the output: json, or as KIND=SOURCE a json_schema, regex, choice (a JSON "
    "list), lark or gbnf",
}


def add_config_flags(
    parser: argparse.ArgumentParser, config: type, leave_out: tuple[str, ...] = ()
) -> None:
    """Add a flag for each field of a config dataclass, in argument groups.

    Args:
        leave_out: fields for which this command has no flag.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = get_type_hints(config)
    for field in fields(config):
        if field.name in leave_out:
            continue
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        help_text = _with_default(field.metadata["help"], field.default)
        _add_flag(groups[group], field, hints[field.name], help_text)


def add_sampling_flags(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """Add a flag for each sampling setting.

    Args:
        defaults: for the help text, defaults of the command that differ from the dataclass's.
    """
    group = parser.add_argument_group("sampling")
    hints = get_type_hints(SamplingParams)
    for field in fields(SamplingParams):
        default = defaults.get(field.name, field.default)
        help_text = _with_default(_SAMPLING_HELP[field.name], default)
        _add_flag(group, field, hints[field.name], help_text)


def given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """Return the fields of a dataclass that were given as flags, with their values."""
    names = {field.name for field in fields(config)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in names
    }


def _add_flag(group: argparse._ArgumentGroup, field: Field[Any], hint: Any, help_text: str) -> None:
    options: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
    kind = _plain_type(hint)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is dict:
        options.update(action=_AddEntry, type=_bias)
    elif get_origin(kind) is tuple:
        options.update(action="append", type=get_args(kind)[0])
    elif kind is Structure:
        options["type"] = _structure
    else:
        options["type"] = kind
    choices = field.metadata.get("choices")
    if choices:
        options["choices"] = choices
    elif kind is not bool:
        options["metavar"] = _metavar(kind)
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _plain_type(hint: Any) -> Any:
    """Return the type without ``None``: ``int | None`` is ``int`` on the command line."""
    if get_origin(hint) is UnionType:
        return next(one for one in get_args(hint) if one is not NoneType)
    return hint


def _metavar(kind: Any) -> str:
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if get_origin(kind) is dict:
        return "ID=X"
    return {int: "N", float: "X", Structure: "KIND=SOURCE"}.get(kind, "TEXT")


def _bias(text: str) -> tuple[str, float]:
    token, _, bias = text.partition("=")
    try:
        return token, float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=NUMBER") from None


def _structure(text: str) -> Structure:
    kind, _, source = text.partition("=")
    try:
        return Structure(kind, source)  # type: ignore[arg-type]  # it looks the kind up itself
    except InvalidRequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _AddEntry(argparse.Action):
    """Collects entries in a dict, one each time that the flag is given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        entries = dict([*getattr(namespace, self.dest, {}).items(), values])
        setattr(namespace, self.dest, entries)


def _with_default(help_text: str, default: Any) -> str:
    if default is None or default is MISSING or default == ():
        return help_text
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{help_text} (default: {default})"
