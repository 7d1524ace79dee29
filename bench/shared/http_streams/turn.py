"""`turn`: many streams from a server at once, and what server and client took for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minserve.workload.server_process import ServerProcess
from shared.http_streams import client
from shared.http_streams.processes import ENGINE, HTTP, READERS, cpu_by_part


class StreamLoad(NamedTuple):
    """Streams at once, and the tokens of each.

    Attributes:
        prompt_tokens: of each prompt; 0 for a few words.
    """

    streams: int
    tokens: int
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StreamTurn:
    """What a load of streams took, while all of them ran.

    Attributes:
        counts: what the client counted.
        cpu_s: processor seconds by part of the server, and of the ``client``.
    """

    counts: client.StreamCounts
    cpu_s: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second as the client saw them."""
        return self.counts.events / self.counts.seconds

    def cpu_us(self) -> dict[str, float]:
        """Return the microseconds of processor time per token, by part."""
        events = max(1, self.counts.events)
        return {part: 1e6 * seconds / events for part, seconds in self.cpu_s.items()}


def turn(server: ServerProcess, model: str, load: StreamLoad) -> StreamTurn:
    """Read a load of streams to their ends, by a client that is a process of its own.

    Raises:
        EngineStoppedError: where a stream did not bring all of its tokens.
    """
    words = [server.url, model, *map(str, load)]
    with subprocess.Popen(
        [sys.executable, client.__file__, *words], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        _await(process.stdout, client.RUNNING, server)
        before = cpu_by_part(server.pid)
        _await(process.stdout, client.ENDING, server)
        after = cpu_by_part(server.pid)
        counts = client.StreamCounts(**json.loads(process.stdout.read()))
    # The last event of a stream has its end, and no token or one that was held back.
    if not all(load.tokens <= num <= load.tokens + 1 for num in counts.by_stream):
        raise server.failed(f"sent {sorted(set(counts.by_stream))} events of {load.tokens} tokens")
    cpu_s = {part: after[part] - before[part] for part in (HTTP, ENGINE, READERS)}
    return StreamTurn(counts, cpu_s | {"client": counts.cpu_s})


def _await(lines: Iterator[str], word: str, server: ServerProcess) -> None:
    if (found := next(lines, "").strip()) != word:
        raise server.failed(
            f"let a stream end before all had begun ({found!r}); ask for more tokens"
        )
