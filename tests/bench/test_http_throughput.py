"""What the benchmark of HTTP counts: events however they are cut, processor time by part, ratios."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from http_throughput import bound, summary
from waiting import wait_until

from shared.http_streams.client import ENDING, RUNNING, CountedStream, count
from shared.http_streams.processes import ENGINE, HTTP, READERS, cpu_by_part

CHUNK = b'data: {"choices":[{"index":0,"text":"finish_reason","finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
# Burns processor time in its main thread, in a second thread, or in a child with these words.
BUSY = """
import subprocess, sys, threading
def burn():
    while True:
        sum(range(10_000))
if "thread" in sys.argv:
    threading.Thread(target=burn, daemon=True).start()
    threading.Event().wait()
if "child" in sys.argv:
    subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv[3:]])
burn()
"""


@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
def test_events_are_counted_once_however_they_are_cut(size: int) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    sent = [CHUNK * num + DONE for num in (4, 5, 6)]
    said: list[str] = []

    def send() -> None:
        for part in (slice(0, len(CHUNK)), slice(len(CHUNK), None)):
            for data, (far, _) in zip(sent, pairs, strict=True):
                rest = data[part]
                for start in range(0, len(rest), size):
                    far.sendall(rest[start : start + size])
            wait_until(lambda: RUNNING in said)
        for far, _ in pairs:
            far.close()

    sender = threading.Thread(target=send)
    sender.start()
    counts = count([CountedStream(near) for _, near in pairs], said.append)
    sender.join()
    assert said == [RUNNING, ENDING]
    assert counts.by_stream == [4, 5, 6]
    assert counts.ended == 3
    # The first events came before all streams ran.
    assert counts.events <= 12


@contextmanager
def busy(*words: str) -> Iterator[psutil.Popen]:
    process = psutil.Popen([sys.executable, "-c", BUSY, BUSY, *words])
    try:
        yield process
    finally:
        for child in process.children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), HTTP),
        (("thread",), ENGINE),
        (("child", "minserve.controller.replica_process"), ENGINE),
        (("child", "minserve.server.reading.child"), READERS),
    ],
)
def test_processor_time_is_told_apart(words: tuple[str, ...], part: str) -> None:
    with busy(*words) as process:

        def most() -> str | None:
            found: Counter[str] = cpu_by_part(process.pid)
            (name, seconds), *_ = found.most_common(1)
            # More than starting takes.
            return name if seconds > 0.5 and seconds > 0.6 * found.total() else None

        assert wait_until(most) == part


def test_a_process_that_has_ended_has_no_time() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not cpu_by_part(process.pid)


def test_one_process_is_bound_by_both_parts_and_two_by_the_slower_one() -> None:
    figures = {"http_us": 10.0, "engine_us": 15.0, "client_us": 99.0, "tokens_per_s": 30_000.0}
    assert bound("own", figures) == pytest.approx(1e6 / 15)
    assert bound("shared", figures) == bound("other", figures) == pytest.approx(40_000)
    slower = {**figures, "http_us": 35.0, "tokens_per_s": 10_000.0}
    found = summary({"own": [figures, figures, slower], "shared": [slower, slower, slower]})
    assert found["own"]["tokens_per_s"] == 30_000.0
    assert found["shared"]["bound_per_s"] == 20_000
    assert found["own/shared"] == {
        "tokens_per_s": 3.0,
        "bound_per_s": pytest.approx(50 / 15, abs=1e-3),
    }
