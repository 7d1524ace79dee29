"""Try clients of others on a live server, and keep what they said: the program of `clients.sh`."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minserve.tables import text_table
from minserve.workload.server_process import ServerCommand, ServerProcess, minserve_command
from parts.clients.catalogue import CLIENTS, PROGRAMS, Client
from parts.clients.environments import programs_of
from shared.program import run_program

MODEL, KEY = "smollm2", "key-of-the-clients"
# float32, as in the reference of lm-eval.
FLAGS = ("--model", MODEL, "--dtype", "float32")
RESULTS = Path(__file__).parents[2] / "results" / "clients"
MOST_LINES = 60
# What libraries say at their end that has to do with nothing here.
_NOISE = re.compile(r"nanobind|^ - (leaked|\.\.\. skipped)|refleaks")
# What a client must not find, so that nothing but its flags counts.
_FOREIGN = re.compile(
    r"PYTHONPATH|(OPENAI|ANTHROPIC|HF|LITELLM|LLM)_.*|(https?|all|no)_proxy", re.I
)


def main() -> int:
    args = _parse()
    if args.list:
        rows = [[client.name, client.packages[0], client.checks] for client in CLIENTS.values()]
        print(text_table(["client", "package", "what is checked"], rows, left=3))
        return 0
    chosen = [CLIENTS[name] for name in args.names or CLIENTS]
    environments = {client.name: programs_of(client) for client in chosen}
    passed: dict[str, bool] = {}
    command = minserve_command(*FLAGS)
    with ServerProcess(
        ServerCommand(command.label, command.command, {"MINSERVE_API_KEY": KEY})
    ) as server:
        for client in chosen:
            passed[client.name] = _try(client, environments[client.name], server.url)
            print(f"{client.name}: {'passed' if passed[client.name] else 'FAILED'}", flush=True)
    print(json.dumps({"clients": len(passed), "passed": sum(passed.values()), "each": passed}))
    return 0 if all(passed.values()) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/clients.sh", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="clients; default: all")
    parser.add_argument("--list", action="store_true", help="print the clients and their checks")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in CLIENTS]:
        parser.error(f"no client {unknown[0]!r}; there are {', '.join(CLIENTS)}")
    return args


def _try(client: Client, programs: Path, url: str) -> bool:
    """Run a client, keep its words, and return whether it was content."""
    with tempfile.TemporaryDirectory() as out:
        places = {
            "bin": str(programs),
            "programs": str(PROGRAMS),
            "url": url,
            "key": KEY,
            "model": MODEL,
            "out": out,
            # Exported only for those that need it: that takes a while.
            "folder": _folder() if _needs_folder(client) else "",
        }
        began = time.monotonic()
        done = subprocess.run(
            [word.format(**places) for word in client.command],
            cwd=out,
            env=_environment(places),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=client.limit_s,
            check=False,
        )
        took_s = time.monotonic() - began
    content = done.returncode == 0 and re.search(client.says, done.stdout) is not None
    words = _tidy(done.stdout, places)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{client.name}.txt").write_text(
        f"{' '.join(client.packages)}\nchecks: {client.checks}\n"
        f"{'passed' if content else f'FAILED with {done.returncode}'} "
        f"in {took_s:.0f} s\n\n{words}\n",
        encoding="utf-8",
    )
    if not content:
        print(words, file=sys.stderr)
    return content


def _needs_folder(client: Client) -> bool:
    return any("{folder}" in word for word in client.command) or client.name == "lm-eval"


def _folder() -> str:
    """Return the model as a Hugging Face folder with its tokenizer."""
    from shared.contending_servers import export_with_tokenizer

    return str(export_with_tokenizer(MODEL, "float32"))


def _environment(places: dict[str, str]) -> dict[str, str]:
    own = {
        "MINSERVE_URL": places["url"],
        "MINSERVE_MODEL": MODEL,
        "MINSERVE_FOLDER": places["folder"],
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": f"{places['url']}/v1",
        "NODE_PATH": str(Path(places["bin"]).parent),
        # Nothing may be asked of a hub, or told to anybody.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HOME": places["out"],
        "COLUMNS": "110",
        "NO_COLOR": "1",
    }
    return {k: v for k, v in os.environ.items() if not _FOREIGN.fullmatch(k)} | own


def _tidy(text: str, places: dict[str, str]) -> str:
    """Return the last lines of a client's words, without colours and without this machine's paths."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace(places["url"], "http://HOST")
    for name in ("out", "folder", "programs", "bin"):
        if places[name]:
            text = text.replace(places[name], name.upper())
    text = text.replace(str(Path(places["bin"]).parent), "ENV").replace(KEY, "KEY")
    text = re.sub(r"(/[\w.+-]+){2,}/", ".../", text)
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.splitlines()]
    return "\n".join([one for one in lines if one and not _NOISE.search(one)][-MOST_LINES:])


if __name__ == "__main__":
    run_program(main)
