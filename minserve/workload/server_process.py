"""`ServerProcess`: runs `minserve serve` in a process of its own, to test it with a workload."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType

from minserve.errors import EngineStoppedError

STOP_S = 60.0
LAST_WORDS = 3000
_ANNOUNCEMENT = re.compile(r" serves .+ on (http://\S+)")


class ServerProcess:
    """A server on a free port of this machine. It is stopped when the context ends.

    Args:
        flags: of ``minserve serve``, without the port.

    Attributes:
        url: the URL of the server.

    Raises:
        EngineStoppedError: if the server did not start; it holds the end of its stderr.
    """

    def __init__(self, flags: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile(  # noqa: SIM115 - closed by `stop`
            mode="w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minserve", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Ctrl-C is meant for the program that runs the load: the server must answer until
            # `stop`.
            start_new_session=True,
        )
        try:
            self.url = self._read_url()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read_url(self) -> str:
        """Wait until the server announces its URL, and return it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := _ANNOUNCEMENT.search(line):
                return found[1]
        self._process.wait()
        raise EngineStoppedError(f"the server did not start:\n{self.last_words()}")

    def last_words(self) -> str:
        """Return the end of the server's stderr."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()[-LAST_WORDS:].strip()

    def stop(self) -> None:
        """Let the server drain and end; kill it if it does not."""
        end(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def end(process: subprocess.Popen) -> None:
    """Ask a process to end; kill it if it does not end within `STOP_S` seconds."""
    process.terminate()
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
