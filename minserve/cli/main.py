"""The ``minserve`` command. Heavy imports happen inside the commands, so help is instant."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from minserve import __version__
from minserve.cli.bench import add_bench
from minserve.cli.ctl import add_ctl
from minserve.cli.generate import add_generate
from minserve.cli.inspect import add_inspect
from minserve.cli.profile import add_profile
from minserve.cli.serve import add_serve
from minserve.cli.simulate import add_simulate
from minserve.errors import MinserveError, WorkloadError
from minserve.exit_codes import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from minserve.log_lines import set_up_logs

_DESCRIPTION = "An LLM inference server in pure PyTorch."
_EXAMPLES = """\
examples:
  minserve serve                                the embedded model on http://127.0.0.1:8000
  minserve serve --model ./Llama-3.2-1B --port 9000
  minserve generate --prompt "Name three colours."
  minserve inspect ./Llama-3.2-1B               what is it, and would it be served?
  minserve profile                              how fast is the model on this machine?
  minserve bench --scenario chatbot --rate 1    how many requests keep their SLOs?
  minserve simulate --scenario chatbot          the same without a device

'minserve COMMAND --help' lists every setting.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: arguments of the command line; default: those of the process.

    Returns:
        0 for success, 1 for an error that was explained on stderr, 2 for a workload that
        cannot be run or a model that would not be served, 130 for Ctrl-C. Wrong usage ends the process with 2 directly.
    """
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}{_hint(args, others)}")
    if not getattr(args, "json", True) and {"logprobs", "prompt_logprobs"} & vars(args).keys():
        parser.error("--logprobs and --prompt-logprobs need --json")
    set_up_logs()
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


def _hint(args: argparse.Namespace, others: Sequence[str]) -> str:
    """Return what may be meant by arguments that a command does not take."""
    takes_model = getattr(args, "takes_model_flag", False) and "model" not in args
    if takes_model and len(others) == 1 and not others[0].startswith("-"):
        return f"; did you mean --model {shlex.quote(others[0])}?"
    return ""


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
    add_serve(commands)
    add_generate(commands)
    add_inspect(commands)
    add_profile(commands)
    add_bench(commands)
    add_simulate(commands)
    add_ctl(commands)
    return parser
