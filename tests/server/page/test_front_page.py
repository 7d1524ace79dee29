"""The page at ``/``: what it tells, whom it tells it, and what it may load."""

from __future__ import annotations

import asyncio
import html
import re
import socket
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import pytest
from aiohttp import ClientSession, web
from live_server import RunningServer, post

from minserve.server.app import Server
from minserve.server.page.front_page import FILES, example_command
from minserve.server_config import ServerConfig

KEY = "a-secret-key"


class Page(HTMLParser):
    """The elements of a page, its links, and the command in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)
        found = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
        self.command = html.unescape(found[1]) if found else None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "a":
            self.links += [value or "" for name, value in attrs if name == "href"]
        else:
            self.loaded += [value or "" for name, value in attrs if name in ("href", "src")]


def get_page(server: RunningServer, **headers: str) -> tuple[dict[str, str], str]:
    status, got, body = post(server, "/", None, headers, method="GET")
    assert status == 200
    return got, body.decode()


def run_in_shell(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"{command} -sS --fail"], env=env, capture_output=True, text=True
    )


def test_it_names_the_model_and_links_to_what_is_there(server: RunningServer) -> None:
    headers, text = get_page(server)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "It serves tiny." in text
    links = Page(text).links
    assert links == ["#content", "health", "metrics", "v1/models", "openapi.json"]
    for link in links:
        path = urljoin("/", link)
        assert post(server, path, None, method="GET")[0] == 200, path


def test_its_command_works(server: RunningServer) -> None:
    command = Page(get_page(server)[1]).command
    assert command is not None
    done = run_in_shell(command, PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert '"model":"tiny"' in done.stdout.replace(" ", "")


def test_only_files_of_the_server_are_loaded_and_run(server: RunningServer) -> None:
    headers, text = get_page(server)
    page = Page(text)
    assert not page.tags & {"img", "iframe", "object", "style"}
    assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
    assert page.loaded == ["page/icon.svg", "page/style.css", "page/main.js"]
    assert not re.search(r"<script[^>]*>[^<]", text)
    policy = headers["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert set(rules.values()) == {"'self'", "'none'"}
    assert rules["script-src"] == rules["connect-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_its_scripts_load_only_each_other(server: RunningServer) -> None:
    scripts = [name for name, kind in FILES.items() if kind == "text/javascript"]
    imported = {"main.js"}
    for name in scripts:
        status, headers, raw = post(server, f"/page/{name}", None, method="GET")
        assert (status, headers["Content-Type"]) == (200, "text/javascript; charset=utf-8")
        assert headers["X-Content-Type-Options"] == "nosniff"
        source = raw.decode()
        imported |= set(re.findall(r'from "\./([a-z]+\.js)"', source))
        # No text of a client can become markup or code, and nothing comes from elsewhere.
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in source, name
        assert set(re.findall(r"https?://[^\"' ]+", source)) <= {"http://www.w3.org/2000/svg"}
    assert imported == set(scripts)


def test_a_host_of_the_clients_own_making_is_only_text(server: RunningServer) -> None:
    status, _, body = post(
        server, "/", None, {"Host": "x\"><script>alert('$(id)')</script>"}, method="GET"
    )
    text = body.decode()
    if status == 200:
        assert Page(text).tags == Page(get_page(server)[1]).tags
        command = Page(text).command
        assert command is not None
        echoed = run_in_shell(f"curl() {{ printf '%s\\n' \"$1\"; }}; {command}", PATH="/usr/bin")
        assert "$(id)" in echoed.stdout
    else:  # such a host may be refused
        assert status == 400
        assert "<script>" not in text


def test_where_a_key_is_needed_it_tells_nothing_that_the_key_protects(
    start_server: Callable[..., RunningServer], tiny_llama_dir: Path
) -> None:
    config = ServerConfig(served_model_name="hidden-name", api_key=(KEY,))
    server = start_server(tiny_llama_dir, config)
    _, text = get_page(server)
    assert "hidden-name" not in text
    assert KEY not in text
    assert str(tiny_llama_dir) not in text
    command = Page(text).command
    assert command is not None
    assert "Bearer KEY" in command
    done = run_in_shell(command.replace("Bearer KEY", f"Bearer {KEY}"), PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert run_in_shell(command, PATH="/usr/bin:/bin").returncode != 0


def test_while_the_model_loads_it_says_so() -> None:
    async def ask() -> tuple[int, str, str]:
        runner = Server(ServerConfig()).create_runner()
        await runner.setup()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            await web.SockSite(runner, sock).start()
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
            async with ClientSession() as session, session.get(url) as answer:
                found = answer.status, answer.content_type, await answer.text()
            await runner.cleanup()
        return found

    status, kind, text = asyncio.run(ask())
    assert (status, kind) == (503, "text/html")
    assert "still loading" in text
    assert Page(text).command is None


@pytest.mark.parametrize("name", ["it's", "<b>", "$HOME", "a b"])
def test_any_name_of_a_model_survives_the_shell(name: str) -> None:
    command = example_command("http://127.0.0.1:1", name, chat=False, needs_key=False)
    echoed = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"${{@: -1}}\"; }}; {command}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f'"model": "{name}"' in echoed.stdout
