"""The ``minserve`` command. Heavy imports happen inside the commands, so help is instant."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from minserve import __version__
from minserve.cli_bench import add_bench
from minserve.cli_ctl import add_ctl
from minserve.cli_flags import add_config_flags, add_sampling_flags, given
from minserve.cli_profile import add_profile
from minserve.cli_replicas import create_controller, follow, is_follower, under_torchrun
from minserve.cli_simulate import add_simulate
from minserve.config import ControllerConfig, EngineConfig, ServerConfig
from minserve.errors import ConfigError, MinserveError, WorkloadError
from minserve.exit_codes import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from minserve.outputs import CompletionOutput, TokenLogprob, acceptance
from minserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minserve.engine.engine import Engine
    from minserve.server.engine_face import EngineFace

GENERATE_MAX_TOKENS = 256
KEY_VARIABLE = "MINSERVE_API_KEY"

_DESCRIPTION = "An LLM inference server in pure PyTorch."
_EXAMPLES = """\
examples:
  minserve serve                                the embedded model on http://127.0.0.1:8000
  minserve serve --model ./Llama-3.2-1B --port 9000
  minserve generate --prompt "Name three colours."
  minserve profile                              how fast is the model on this machine?
  minserve bench --scenario chatbot --rate 1    how many requests keep their SLOs?
  minserve simulate --scenario chatbot          the same without a device

'minserve COMMAND --help' lists every setting.
"""
_SERVE_EXAMPLES = """\
examples:
  minserve serve
  minserve serve --model ./Llama-3.2-1B --dtype bfloat16 --max-model-len 8192
  minserve serve --model ./model.gguf --served-model-name chat --host 0.0.0.0
  MINSERVE_API_KEY=secret minserve serve --port 9000

The API is OpenAI's: point a client at http://HOST:PORT/v1. SIGTERM or Ctrl-C lets running
requests finish (--shutdown-timeout); a second one ends the process at once.
"""
_GENERATE_EXAMPLES = """\
examples:
  minserve generate --prompt "Name three colours."
  minserve generate --raw --prompt "The capital of France is" --temperature 0 --max-tokens 8
  minserve generate --prompt "Tell a story." --seed 7 --top-p 0.9 --json
  git diff | minserve generate --prompt - --max-tokens 512
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: arguments of the command line; default: those of the process.

    Returns:
        0 for success, 1 for an error that was explained on stderr, 2 for a workload that
        cannot be run, 130 for Ctrl-C. Wrong usage ends the process with 2 directly.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not getattr(args, "json", True) and {"logprobs", "prompt_logprobs"} & vars(args).keys():
        parser.error("--logprobs and --prompt-logprobs need --json")
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    try:
        return args.command(args)
    except MinserveError as error:
        print(f"minserve: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, WorkloadError) else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has closed it (`| head`). Python would report an error once
        # more when it flushes at exit, so stdout goes nowhere from here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="minserve",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_generate(commands)
    add_profile(commands)
    add_bench(commands)
    add_simulate(commands)
    add_ctl(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's HTTP API",
        description="Serve a model over OpenAI's HTTP API.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_config_flags(parser, ServerConfig)
    add_config_flags(parser, ControllerConfig)
    add_config_flags(parser, EngineConfig)
    parser.set_defaults(command=_serve)


def _add_generate(commands: argparse._SubParsersAction) -> None:
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
    add_sampling_flags(parser, {"max_tokens": GENERATE_MAX_TOKENS})
    add_config_flags(parser, EngineConfig, leave_out=("seed",))
    parser.set_defaults(command=_generate)


def _serve(args: argparse.Namespace) -> int:
    """Bind the socket, load the model, and serve until a signal comes."""
    import asyncio

    settings = given(args, ServerConfig)
    settings.setdefault("api_key", os.environ.get(KEY_VARIABLE) or None)
    server_config = ServerConfig(**settings)
    engine_settings = given(args, EngineConfig)
    EngineConfig.create(**engine_settings)  # refuse wrong settings before anything slow

    controller_config = under_torchrun(ControllerConfig(**given(args, ControllerConfig)))
    if is_follower():
        return follow(controller_config, engine_settings, server_config)

    from minserve.server import lifecycle

    sock = lifecycle.bind_socket(server_config.host, server_config.port)
    url = lifecycle.reachable_url(sock)

    def load_engine() -> EngineFace:
        if controller_config.replicas > 1:
            return create_controller(controller_config, engine_settings, server_config)
        from minserve import AsyncEngine

        engine = AsyncEngine(**engine_settings)
        engine.warm_up()
        if engine.perf_model is None:
            engine.profile(server_config.profile_seconds, progress=True)
        unkept = engine.unattainable_classes()
        if unkept:
            logging.getLogger(__name__).warning(unkept)
        return engine

    def announce(engine: EngineFace, model: str) -> None:
        chat = engine.tokenizer is not None and engine.tokenizer.has_chat_template
        needs_key = server_config.api_key is not None
        print(lifecycle.ready_message(url, model, chat=chat, needs_key=needs_key), flush=True)

    try:
        ended_by = asyncio.run(lifecycle.serve(sock, server_config, load_engine, announce))
    except lifecycle.LoadInterrupted as interrupted:
        _exit_now(_exit_code(interrupted.signal_number))
    return _exit_code(ended_by)


def _exit_code(signal_number: int) -> int:
    """Return 0 for SIGTERM, the usual way to end a server, and 128 + the signal for Ctrl-C."""
    return 0 if signal_number == signal.SIGTERM else 128 + signal_number


def _exit_now(code: int) -> NoReturn:
    """End the process without the interpreter's own shutdown.

    That shutdown may crash while another thread is still inside torch.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _generate(args: argparse.Namespace) -> int:
    """Load the model, generate, and print the output."""
    params = SamplingParams(**{"max_tokens": GENERATE_MAX_TOKENS, **given(args, SamplingParams)})
    settings = given(args, EngineConfig)
    settings.pop("seed", None)  # here --seed is the request's
    EngineConfig.create(**settings)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    logging.getLogger().setLevel(logging.WARNING)

    from minserve import Engine

    started = time.perf_counter()
    engine = Engine(**settings)
    load_s = time.perf_counter() - started
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


def _as_prompt(engine: Engine, text: str, chat: bool | None) -> str | list[dict[str, str]]:
    has_template = engine.tokenizer is not None and engine.tokenizer.has_chat_template
    if chat and not has_template:
        raise ConfigError("this model has no chat template; use --raw")
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
