"""A page in headless Chromium, driven over a pipe by its own protocol (CDP); no other package needed.

https://chromedevtools.github.io/devtools-protocol/ has all methods.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NO_CHROMIUM = "Chromium is not installed (on Debian: apt-get install chromium)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--no-proxy-server", "--hide-scrollbars",
)  # fmt: skip
PATIENCE_S = 120.0


class BrowserPage:
    """One page, with all that it has complained of.

    Attributes:
        complaints: errors and warnings of its console, of what it loads, and of its policy.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.complaints: list[str] = []

    def open(self) -> None:
        """Make the page, and listen to what it says."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def go(self, url: str) -> None:
        """Load a page and wait until its document is there."""
        self.call("Page.navigate", url=url)
        self.wait_for(
            f"location.href.startsWith({json.dumps(url)}) && document.readyState !== 'loading'"
        )

    def evaluate(self, expression: str) -> Any:
        """Return what an expression of JavaScript gives, where that has a form in JSON.

        Raises:
            RuntimeError: if it throws.
        """
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Return what an expression gives once that is true.

        Raises:
            TimeoutError: if it never is.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} stays {value}; {self.complaints}")
            time.sleep(0.03)
        return value

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
        """Set the size of the window in CSS pixels, and whether the user likes it dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str, text: str = "", modifiers: int = 0) -> None:
        """Press and let go a key, such as ``Tab``."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind, key=key, modifiers=modifiers, text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode=codes.get(key, 0),
            )  # fmt: skip

    def type(self, text: str) -> None:
        """Write a text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, *, height: int | None = None) -> bytes:
        """Return the page as PNG.

        Args:
            height: of the picture from the top, in CSS pixels; by default all of the page.
        """
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": 0,
            "width": size["width"],
            "height": height or size["height"],
            "scale": 1,
        }
        shot = self.call(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
        return base64.b64decode(shot["data"])

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol and return its result.

        Raises:
            RuntimeError: if it fails.
            TimeoutError: if no answer comes.
        """
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self._note(told)

    def _note(self, told: dict[str, Any]) -> None:
        params = told.get("params", {})
        match told.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(
                    f"{params['entry']['text']} {params['entry'].get('url', '')}"
                )

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._reading], [], [], PATIENCE_S)[0]:
                raise TimeoutError("Chromium says nothing")
            data = os.read(self._reading, 2**20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def chromium(profile: Path) -> Iterator[BrowserPage]:
    """A page of a new browser.

    Args:
        profile: a folder for the browser's files.

    Raises:
        RuntimeError: where Chromium is not installed.
    """
    if CHROMIUM is None:
        raise RuntimeError(NO_CHROMIUM)
    to_browser, from_browser = os.pipe(), os.pipe()
    # It wants them as 3 and 4; these numbers are free in no process for certain but a shell's child.
    ends = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (to_browser[0], from_browser[1])]
    browser = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", CHROMIUM, *FLAGS,
         "--remote-debugging-pipe", f"--user-data-dir={profile}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=ends, start_new_session=True,
    )  # fmt: skip
    for one in (*ends, to_browser[0], from_browser[1]):
        os.close(one)
    try:
        page = BrowserPage(from_browser[0], to_browser[1])
        page.open()
        yield page
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
