"""An environment for each client, made on first use below the user's cache folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from parts.clients.catalogue import Client
from shared.peers import CACHE, vllm_python

HOME = CACHE.parent / "clients"


def programs_of(client: Client) -> Path:
    """Return the folder with the programs of a client, which is installed if it is not here.

    Raises:
        subprocess.CalledProcessError: if it cannot be installed; its words are on stderr.
    """
    if client.source == "vllm":
        return Path(vllm_python()).parent
    name = re.sub(r"[^\w.-]+", "-", client.packages[0]).strip("-")
    # Two registries may have packages of one name.
    home = HOME / (name if client.source == "pip" else f"{client.source}-{name}")
    if not (home / "ready").exists():
        print(f"installing {' '.join(client.packages)}", file=sys.stderr, flush=True)
        {"pip": _pip, "npm": _npm, "apt": _apt}[client.source](client, home)
        (home / "ready").touch()
    return home / {"pip": "bin", "npm": "node_modules/.bin", "apt": "usr/bin"}[client.source]


def _pip(client: Client, home: Path) -> None:
    _run([sys.executable, "-m", "venv", "--clear", str(home)])
    pip = [str(home / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check"]
    _run([*pip, "install", *client.packages])


def _npm(client: Client, home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    _run(["npm", "install", "--no-fund", "--no-audit", "--prefix", str(home), *client.packages])


def _apt(client: Client, home: Path) -> None:
    """Unpack Debian's packages without installing them: they would start services."""
    home.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", *client.packages], cwd=home)
    for package in home.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(home)])


def _run(command: list[str], cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=cwd, env=_clean_environment())


def _clean_environment() -> dict[str, str]:
    """Return this environment without what belongs to this program's own Python."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
