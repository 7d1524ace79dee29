"""``minserve serve``: answer OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from minserve.cli.flags import add_config_flags, given
from minserve.cli.replicas import (
    create_controller,
    follow,
    is_apart,
    is_follower,
    under_torchrun,
)
from minserve.cli.standard_files import secure_standard_files
from minserve.config import EngineConfig
from minserve.exit_codes import EXIT_HUNG
from minserve.log_lines import set_up_logs
from minserve.process_config import ControllerConfig, ProcessConfig
from minserve.server_config import ServerConfig

if TYPE_CHECKING:
    from minserve.server.engine_face import EngineFace

KEY_VARIABLE = "MINSERVE_API_KEY"

_SERVE_EXAMPLES = """\
examples:
  minserve serve
  minserve serve --model ./Llama-3.2-1B --dtype bfloat16 --max-model-len 8192
  minserve serve --model ./model.gguf --served-model-name chat --host 0.0.0.0
  MINSERVE_API_KEY=secret minserve serve --port 9000

The API is OpenAI's: point a client at http://HOST:PORT/v1. SIGTERM or Ctrl-C lets running
requests finish (--shutdown-timeout); a second one ends the process at once.
"""


def add_serve(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's HTTP API",
        description="Serve a model over OpenAI's HTTP API.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_config_flags(parser, ServerConfig)
    add_config_flags(parser, ProcessConfig)
    add_config_flags(parser, ControllerConfig)
    add_config_flags(parser, EngineConfig)
    parser.set_defaults(command=_serve, takes_model_flag=True)


def _serve(args: argparse.Namespace) -> int:
    """Bind the socket, load the model, and serve until a signal comes."""
    import asyncio

    secure_standard_files()
    settings = given(args, ServerConfig)
    if "api_keys_file" not in settings and (key := os.environ.get(KEY_VARIABLE)):
        settings.setdefault("api_key", (key,))
    server_config = ServerConfig(**settings)
    set_up_logs(server_config.log_format)
    engine_settings = given(args, EngineConfig)
    engine_config = EngineConfig.create(**engine_settings)  # refuse wrong settings early
    processes = ProcessConfig(**given(args, ProcessConfig))
    controller_config = under_torchrun(ControllerConfig(**given(args, ControllerConfig)))
    processes.check_fits(controller_config, engine_config)
    if is_follower():
        return follow(controller_config, engine_settings, server_config)

    from minserve.models.finding.source import find_model
    from minserve.server import lifecycle

    sock = lifecycle.bind_socket(server_config.host, server_config.port)
    url = lifecycle.reachable_url(sock)

    def load_engine() -> EngineFace:
        # A model that is not to be had is told before torch is imported.
        find_model(engine_config.model)
        if controller_config.replicas > 1 or is_apart(processes, engine_config):
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
        chat, needs_key = engine.tokenizer.has_chat_template, server_config.has_keys
        _tell(url, lifecycle.ready_message(url, model, chat=chat, needs_key=needs_key))

    try:
        ended = asyncio.run(lifecycle.serve(sock, server_config, load_engine, announce))
    except lifecycle.LoadInterrupted as interrupted:
        _exit_now(_exit_code(interrupted.signal_number))
    code = EXIT_HUNG if ended.signal_number is None else _exit_code(ended.signal_number)
    if ended.hangs:
        _exit_now(code)
    return code


def _tell(url: str, message: str) -> None:
    """Print what a user needs to know of a server at this address."""
    try:
        print(message, flush=True)
    except OSError as error:
        # A full disk, or a reader that has gone, is no reason not to serve. What is still in the
        # buffer goes nowhere, or Python would fail once more when it ends.
        logging.getLogger(__name__).warning(
            "%s is served, which stdout is not told: %s", url, error
        )
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
