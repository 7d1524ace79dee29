"""A light client: many streams read as raw bytes in one thread, their events counted and not parsed.

    python client.py URL MODEL STREAMS TOKENS PROMPT_TOKENS

It is a process of its own, so that its processor time is told apart. It begins all streams at once, and says
`RUNNING` when the last of them has begun, `ENDING` when the first has ended, and at the end what came, as JSON.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from urllib.parse import urlsplit

RUNNING, ENDING = "running", "ending"
RECEIVE = 2**16
# Of a prompt's token ids, those of the first stream; lower ones may end a text.
FIRST_ID = 3
# The last event of a stream, and what every event of a token has.
LAST, EVENT = b"data: [DONE]\n\n", b'"finish_reason":'


@dataclass(slots=True)
class StreamCounts:
    """What came.

    Attributes:
        seconds: for which all streams ran.
        events: events with a token, or with the end of a stream, that came in that time.
        reads: times in that time that something was read.
        cpu_s: processor seconds of this process in that time.
        by_stream: all such events of each stream.
        first_s: seconds of each stream from its request to its first token.
        token_s: seconds of each stream between two tokens, the mean of them all.
        ended: streams that came to their end.
    """

    seconds: float = 0.0
    events: int = 0
    reads: int = 0
    cpu_s: float = 0.0
    by_stream: list[int] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    ended: int = 0


@dataclass(slots=True)
class CountedStream:
    """A stream under way.

    Attributes:
        tail: the end of what was read, as far as an event may begin in it that is not counted yet.
        ends: its last event was read.
        asked_s: when it was asked for; like the next two, by `time.perf_counter`.
        first_s: when its first event was read.
        newest_s: when its newest event was read.
    """

    sock: socket.socket
    asked_s: float = 0.0
    first_s: float = 0.0
    newest_s: float = 0.0
    num_events: int = 0
    tail: bytes = b""
    ends: bool = False

    def read(self) -> int:
        """Take what is there, and return the number of new events; a connection that is over has
        ``ends`` set.
        """
        data = self.sock.recv(RECEIVE)
        text = self.tail + data
        num = text.count(EVENT)
        behind = text.rfind(EVENT) + len(EVENT) if num else 0
        self.tail = text[max(behind, len(text) - len(EVENT) - len(LAST)) :]
        if num:
            self.newest_s = time.perf_counter()
            self.first_s = self.first_s or self.newest_s
        self.num_events += num
        self.ends = not data or LAST in text
        return num


def open_stream(
    url: str, model: str, number: int, tokens: int, prompt_tokens: int
) -> CountedStream:
    """Ask for a stream of so many tokens, behind a prompt that no other stream has.

    Args:
        prompt_tokens: length of the prompt; 0 for a few words.
    """
    place = urlsplit(url)
    assert place.hostname is not None
    body = json.dumps(
        {
            "model": model,
            "prompt": [FIRST_ID + number] * prompt_tokens or f"stream {number} says",
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": number,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    sock = socket.create_connection((place.hostname, place.port or 80))
    asked_s = time.perf_counter()
    sock.sendall(head.encode() + body)
    sock.setblocking(False)
    return CountedStream(sock, asked_s)


def count(streams: list[CountedStream], say: Callable[[str], object]) -> StreamCounts:
    """Read all streams to their ends.

    Args:
        say: called with `RUNNING` and `ENDING`.
    """
    counts, waiting = StreamCounts(), len(streams)
    began_s = began_cpu_s = 0.0
    with selectors.DefaultSelector() as selector:
        for one in streams:
            selector.register(one.sock, selectors.EVENT_READ, one)
        while selector.get_map():
            for key, _ in selector.select():
                stream: CountedStream = key.data
                had_begun = stream.num_events > 0
                num = stream.read()
                if not waiting and not counts.ended:
                    counts.events += num
                    counts.reads += 1
                if num and not had_begun:
                    waiting -= 1
                    if not waiting:
                        say(RUNNING)
                        began_s, began_cpu_s = time.perf_counter(), time.process_time()
                if stream.ends:
                    if not counts.ended:
                        counts.seconds = time.perf_counter() - began_s
                        counts.cpu_s = time.process_time() - began_cpu_s
                        say(ENDING)
                    counts.ended += 1
                    selector.unregister(stream.sock)
                    stream.sock.close()
    counts.by_stream = [one.num_events for one in streams]
    counts.first_s = [one.first_s - one.asked_s for one in streams]
    counts.token_s = [(one.newest_s - one.first_s) / max(1, one.num_events - 1) for one in streams]
    return counts


def main(url: str, model: str, streams: str, tokens: str, prompt_tokens: str) -> None:
    opened = [
        open_stream(url, model, number, int(tokens), int(prompt_tokens))
        for number in range(int(streams))
    ]
    print(json.dumps(asdict(count(opened, partial(print, flush=True)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
