"""Web pages of other origins in a real browser: a site that serves them, and headless Chromium."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from waiting import PATIENCE_S

from parts.page_picture.chromium import CHROMIUM

PAGE = """<!doctype html><title>a page</title><script>
async function attempt(url, options) {
  try {
    const answer = await fetch(url, options);
    return {type: answer.type, status: answer.status, text: await answer.text(),
            id: answer.headers.get("x-request-id")};
  } catch (error) { return {type: "failed", text: String(error)}; }
}
(async () => {
  let found;
  try { found = await (async () => { SCRIPT })(); } catch (error) { found = {error: String(error)}; }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Site(http.server.ThreadingHTTPServer):
    """A site with one page, whose script's finding it keeps.

    What is asked of it beside the page goes on to another server as it is, Host and all: so it looks
    to that server when the site's name has been made to point to it (DNS rebinding).
    """

    daemon_threads = True

    def __init__(self, rebound_to: str) -> None:
        super().__init__(("127.0.0.1", 0), _Visit)
        self.page = b""
        self.rebound_to = urlsplit(rebound_to).netloc
        self.found: queue.Queue[Any] = queue.Queue()


class _Visit(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        if self.path == "/page":
            self._answer(200, "text/html", self.server.page)
        else:
            self._pass_on()

    def do_POST(self) -> None:
        if self.path == "/found":
            self.server.found.put(json.loads(self._body()))
            self._answer(200, "text/plain", b"")
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        connection = http.client.HTTPConnection(self.server.rebound_to, timeout=PATIENCE_S)
        connection.request(self.command, self.path, self._body(), dict(self.headers.items()))
        answer = connection.getresponse()
        self._answer(answer.status, answer.headers["Content-Type"], answer.read())
        connection.close()

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def site(rebound_to: str) -> Iterator[Site]:
    """A running site; ``rebound_to`` is the URL of the other server."""
    with Site(rebound_to) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(PATIENCE_S)


def visit(running: Site, script: str, host: str, profile: Path) -> Any:
    """What the script of a site's page found in Chromium.

    Args:
        script: the body of a JavaScript function, which returns what it found.
        host: the site's name; ``.test`` names point to this machine.
        profile: a folder for the browser's files.
    """
    assert CHROMIUM is not None
    running.page = PAGE.replace("SCRIPT", script).encode()
    browser = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-dev-shm-usage", "--disable-background-networking", "--no-proxy-server",
         "--host-resolver-rules=MAP *.test 127.0.0.1", f"--user-data-dir={profile}",
         f"http://{host}:{running.server_port}/page"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        return running.found.get(timeout=PATIENCE_S)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait(PATIENCE_S)
