"""Server processes: how they become ready, what their errors say, and that they leave nothing."""

from __future__ import annotations

import sys
import time
import urllib.request

import psutil
import pytest
from waiting import is_alive, wait_until

from minserve.errors import EngineStoppedError
from minserve.workload import server_process
from minserve.workload.server_process import ServerCommand, ServerProcess, minserve_command

# A server of another project: it has a child process, and tells where it runs.
PEER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
port = int(sys.argv[sys.argv.index("--port") + 1])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        words = f"{child.pid} {os.listdir()} {os.environ['TOLD']}".encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(words)

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def peer(code: str) -> ServerCommand:
    return ServerCommand("peer", [sys.executable, "-c", code], {"TOLD": "this"}, is_peer=True)


def test_a_peer_is_ready_when_it_is_healthy_and_ends_with_its_children() -> None:
    with ServerProcess(peer(PEER)) as server:
        with urllib.request.urlopen(f"{server.url}/health") as answer:
            child, *words = answer.read().decode().split()
        assert words == ["[]", "this"], "it runs in an empty folder, with its variables"
        assert server.cpu_seconds() > 0
        assert is_alive(int(child))
    wait_until(lambda: not is_alive(int(child)))
    assert server.cpu_seconds() == 0


def test_a_server_that_ends_at_its_start_says_why() -> None:
    with pytest.raises(EngineStoppedError, match=r"(?s)minserve did not start.*/nowhere/at/all"):
        ServerProcess(minserve_command("--model", "/nowhere/at/all"))


def test_a_peer_that_is_never_ready_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "PEER_START_S", 0.2)
    started = time.time()
    with pytest.raises(EngineStoppedError, match=r"peer was not ready within 0\.2 s"):
        ServerProcess(peer("import time; time.sleep(600)"))
    mine = psutil.Process().children()
    assert [one for one in mine if one.create_time() > started] == []


def test_a_server_announces_its_url() -> None:
    code = "import time; print('x serves y on http://z:1', flush=True); time.sleep(600)"
    command = ServerCommand("own", [sys.executable, "-c", code])
    with ServerProcess(command) as server:
        assert server.url == "http://z:1"
        assert "serves y" in server.last_words()
