"""Makes the picture of the page at `/`: a server with a mix of requests, in headless Chromium.

It needs Chromium. Chats, code and summaries come, each class with an SLO of its own; meanwhile something is
asked in the page's own chat box, and what the page shows then is kept. The last line is JSON: the picture's ``bytes``, and ``complaints`` of the
browser's console, of which there should be none.

    .venv/bin/python bench/page_picture.py                      # docs/page.png; a minute
    .venv/bin/python bench/page_picture.py --out /tmp/phone.png --width 360 --dark
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from minserve.workload.server_process import ServerProcess, minserve_command
from parts.page_picture.chromium import BrowserPage, chromium
from shared.program import positive, run_program

OUT = Path(__file__).parents[1] / "docs" / "page.png"
# Generous, so that a laptop keeps most of them.
CLASSES = """
[chat]
ttft_ms = 3000
tpot_ms = 400
[code]
ttft_ms = 2500
tpot_ms = 250
[summary]
ttft_ms = 8000
tpot_ms = 500
"""
RATE = 0.4
TEXT = (
    "A server that keeps promises plans in every iteration which tokens of which request run, so that "
    "a long prompt does not hold up a chat that cannot wait, and a chat does not hold up a prompt."
)


class Kind(NamedTuple):
    """Requests of one sort: their class, the words of their prompt, and the tokens of their output."""

    slo: str | None
    num_words: int
    num_tokens: int


KINDS = (
    Kind("chat", 30, 60),
    Kind("chat", 60, 90),
    Kind("code", 80, 40),
    Kind("summary", 300, 30),
    Kind(None, 60, 60),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=OUT, help="the picture")
    parser.add_argument("--width", type=positive, default=1120, help="of the window, in CSS pixels")
    parser.add_argument("--dark", action="store_true", help="as for people who like it dark")
    parser.add_argument("--seconds", type=positive, default=60, help="of load before the picture")
    parser.add_argument("--rate", type=float, default=RATE, help="requests per second")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        classes = Path(folder, "classes.toml")
        classes.write_text(CLASSES)
        command = minserve_command(
            "--model", args.model, "--slo-classes", str(classes), "--speculator", "draft"
        )
        with ServerProcess(command) as server, chromium(Path(folder, "browser")) as page:
            load = threading.Thread(
                target=lambda: asyncio.run(send(server.url, args.rate, args.seconds)), daemon=True
            )
            load.start()
            picture = take(page, server.url, args)
    args.out.write_bytes(picture)
    print(json.dumps({"bytes": len(picture), "complaints": page.complaints}))
    return 0


def take(page: BrowserPage, url: str, args: argparse.Namespace) -> bytes:
    """Return the page after a while, down to the end of its requests."""
    page.look(args.width, 900, dark=args.dark, scale=2.0 if args.width < 600 else 1.0)
    page.go(f"{url}/")
    page.wait_for("document.getElementById('promise').options.length > 1")
    time.sleep(0.6 * args.seconds)
    page.evaluate("document.getElementById('most').value = 48")
    page.evaluate("document.getElementById('promise').value = 'chat'")
    page.evaluate("document.getElementById('promise').dispatchEvent(new Event('change'))")
    page.evaluate("document.getElementById('send').click()")
    time.sleep(0.35 * args.seconds)
    page.evaluate("document.activeElement.blur()")
    end = "document.getElementById('lanes').closest('section').getBoundingClientRect().bottom"
    return page.screenshot(height=int(page.evaluate(f"{end} + scrollY")) + 14)


async def send(url: str, rate: float, seconds: float) -> None:
    """Send requests of all kinds at random times for so long."""
    rng = random.Random(1)
    until = time.monotonic() + seconds
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        while time.monotonic() < until:
            tasks.create_task(ask(session, url, rng.choice(KINDS), rng.random()))
            await asyncio.sleep(rng.expovariate(rate))


async def ask(session: aiohttp.ClientSession, url: str, kind: Kind, seed: float) -> None:
    words = random.Random(seed).choices(TEXT.split(), k=kind.num_words)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": " ".join(words)}],
        "max_tokens": kind.num_tokens,
        "temperature": 0,
        "slo": kind.slo,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        await answer.read()


if __name__ == "__main__":
    run_program(main)
