"""``minserve generate``: answer one prompt on the console."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from minserve.cli.flags import add_config_flags, add_sampling_flags, given
from minserve.config import EngineConfig
from minserve.errors import ConfigError
from minserve.outputs import CompletionOutput, TokenLogprob, acceptance
from minserve.sampling_params import GENERATION_CONFIG_FIELDS, SamplingParams

if TYPE_CHECKING:
    from minserve.engine.engine import Engine

GENERATE_MAX_TOKENS = 256
# Settings that a model's generation_config.json may propose, with what counts without it.
_MODELS_OWN = {
    name: GENERATE_MAX_TOKENS if name == "max_tokens" else getattr(SamplingParams(), name)
    for name in GENERATION_CONFIG_FIELDS.values()
}

_GENERATE_EXAMPLES = """\
examples:
  minserve generate --prompt "Name three colours."
  minserve generate --raw --prompt "The capital of France is" --temperature 0 --max-tokens 8
  minserve generate --prompt "Tell a story." --seed 7 --top-p 0.9 --json
  git diff | minserve generate --prompt - --max-tokens 512
"""


def add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer one prompt on the console",
        description="Generate text for one prompt and print it as it comes.",
        epilog=_GENERATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from stdin"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        dest="chat",
        action="store_true",
        default=None,
        help="send the prompt as a chat message (default where the model has a chat template)",
    )
    form.add_argument(
        "--raw",
        dest="chat",
        action="store_false",
        help="continue the prompt's text, without the chat template",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with ids, usage and timings"
    )
    # Sampling has its own --seed, and one request needs no second one.
    own = {name: f"the model's own, else {default}" for name, default in _MODELS_OWN.items()}
    add_sampling_flags(parser, own)
    add_config_flags(parser, EngineConfig, leave_out=("seed",))
    parser.set_defaults(command=_generate, takes_model_flag=True)


def _generate(args: argparse.Namespace) -> int:
    """Load the model, generate, and print the output."""
    wanted = given(args, SamplingParams)
    SamplingParams(**{"max_tokens": None, **wanted})  # refuse wrong settings before anything slow
    settings = given(args, EngineConfig)
    settings.pop("seed", None)  # here --seed is the request's
    config = EngineConfig.create(**settings)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    logging.getLogger().setLevel(logging.WARNING)

    from minserve.models.finding.source import find_model

    find_model(config.model)  # a model that is not to be had is told before torch is imported

    from minserve import Engine

    started = time.perf_counter()
    engine = Engine(**settings)
    load_s = time.perf_counter() - started
    params = _params(engine.sampling_defaults, wanted)
    prompt = _as_prompt(engine, text, args.chat)
    if args.json:
        report = _report(engine, text, prompt, params)
        report["timings"]["load_s"] = round(load_s, 4)
        print(json.dumps(report, ensure_ascii=False))
    elif params.n == 1:
        for delta in engine.stream(prompt, params):
            print(delta.text, end="", flush=True)
        print()
    else:
        for output in engine.generate(prompt, params)[0].outputs:
            print(f"--- {output.index + 1} of {params.n}\n{output.text}")
    return 0


def _params(defaults: Mapping[str, Any], wanted: Mapping[str, Any]) -> SamplingParams:
    """Return the settings of a request: those that are wanted, else the model's own."""
    if "max_tokens" in wanted or "max_tokens" not in defaults:
        return SamplingParams(**{"max_tokens": GENERATE_MAX_TOKENS, **defaults, **wanted})
    # The engine cuts the model's own limit to what fits behind the prompt.
    return SamplingParams(**{**defaults, **wanted, "max_tokens": None})


def _as_prompt(engine: Engine, text: str, chat: bool | None) -> str | list[dict[str, str]]:
    has_template = engine.tokenizer.has_chat_template
    if chat and not has_template:
        raise ConfigError(
            "this model has no chat template; use --raw, or give one with --chat-template FILE"
        )
    if has_template and chat is not False:
        return [{"role": "user", "content": text}]
    return text


def _report(
    engine: Engine, text: str, prompt: str | list[dict[str, str]], params: SamplingParams
) -> dict[str, Any]:
    """Generate, and return the result for --json. Times are in seconds."""
    started = time.perf_counter()
    result = engine.generate(prompt, params)[0]
    generate_s = time.perf_counter() - started
    num_output_tokens = sum(len(output.token_ids) for output in result.outputs)
    outputs = [_describe(output) for output in result.outputs]
    report: dict[str, Any] = {"model": engine.model_name, "prompt": text, **outputs[0]}
    if params.n > 1:
        report["outputs"] = outputs
    if result.prompt_logprobs is not None:
        report["prompt_logprobs"] = [_describe_logprob(one) for one in result.prompt_logprobs]
    report["usage"] = {
        "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": num_output_tokens,
        "total_tokens": len(result.prompt_token_ids) + num_output_tokens,
    }
    if engine.speculates:
        report["usage"]["acceptance"] = acceptance(
            sum(output.num_draft_tokens for output in result.outputs),
            sum(output.num_accepted_tokens for output in result.outputs),
        )
    report["timings"] = {
        "generate_s": round(generate_s, 4),
        "output_tokens_per_s": round(num_output_tokens / generate_s, 2),
    }
    return report


def _describe(output: CompletionOutput) -> dict[str, Any]:
    described: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        described["logprobs"] = [_describe_logprob(one) for one in output.logprobs]
    return described


def _describe_logprob(entry: TokenLogprob | None) -> dict[str, Any] | None:
    """Return the entry as JSON values; ``None`` for a prompt's first token."""
    return None if entry is None else asdict(entry)
