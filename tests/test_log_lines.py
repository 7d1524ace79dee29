"""Log records as lines: nothing in a message makes two lines of one, and no reader stops a writer."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
from waiting import PATIENCE_S

from minserve.log_lines import CUT, MAX_MESSAGE, JsonLines, LineHandler, TextLines

NASTY = 'a\nb\rc\x00d\x1b[2Je\x85f\u2028g\u202eh\ud800i"j\\ké'


def record(message: str, error: Exception | None = None) -> logging.LogRecord:
    told = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("a.logger", logging.WARNING, "", 0, "%s", (message,), told)


def raised(message: str) -> Exception:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


def test_a_message_is_one_line_of_text() -> None:
    text = TextLines().format(record(NASTY))
    assert text[8:].startswith(' WARNING a\\nb\\rc\\x00d\\x1b[2Je\\x85f\\u2028g\\u202eh\\ud800i"j')
    assert text.endswith("ké")
    assert len(text.splitlines()) == 1
    assert "replica 3: a" in TextLines("replica 3: ").format(record("a"))


def test_a_message_is_one_object_of_json() -> None:
    line = JsonLines(replica=3).format(record(NASTY))
    assert line.isascii()
    assert line.isprintable()
    told = json.loads(line)
    assert told["message"] == NASTY.replace("\ud800", "\\ud800")
    assert (told["level"], told["logger"], told["replica"]) == ("warning", "a.logger", 3)
    assert set(told) == {"time", "level", "logger", "message", "replica"}
    assert told["time"].endswith("Z")


def test_a_traceback_looks_like_no_record() -> None:
    error = raised("x\n12:00:00 INFO forged\u202812:00:00 INFO forged")
    first, *others = TextLines().format(record("it failed", error)).splitlines()
    assert first.endswith("it failed")
    assert len(others) > 3
    assert all(line.startswith("  ") for line in others)
    told = json.loads(JsonLines().format(record("it failed", error)))
    assert "12:00:00 INFO forged" in told["exception"]


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_lines_have_an_end(formatter: logging.Formatter) -> None:
    text = formatter.format(record("m" * 10**6, raised("e" * 10**6)))
    assert len(text) < 6 * MAX_MESSAGE
    assert CUT in text


def test_a_log_that_nobody_reads_stops_nobody() -> None:
    into, out = os.pipe()
    with os.fdopen(into, "r") as reader, os.fdopen(out, "w") as stream:
        handler = LineHandler(stream)
        handler.setFormatter(JsonLines())
        writer = threading.Thread(
            target=lambda: [handler.emit(record("m" * 500)) for _ in range(1000)], daemon=True
        )
        writer.start()
        writer.join(PATIENCE_S)
        assert not writer.is_alive()
        written = os.read(into, 10**6).decode().splitlines()
        assert 0 < len(written) < 1000
        handler.emit(record("after"))
        lost, last = (json.loads(reader.readline()) for _ in range(2))
        assert f"{1000 - len(written)} lines were lost" in lost["message"]
        assert (lost["level"], last["message"]) == ("warning", "after")


def test_streams_that_are_no_files_are_written_to() -> None:
    stream = io.StringIO()
    handler = LineHandler(stream)
    handler.setFormatter(TextLines())
    handler.emit(record("m" * 3000))
    assert stream.getvalue().endswith("m" * 3000 + "\n")


SET_UP = """
import logging, warnings
from minserve.log_lines import set_up_logs
set_up_logs()
set_up_logs("json", replica=1)
logging.getLogger("there").info("hello\\n%s", "you")
warnings.warn("look out")
"""


def test_all_records_of_a_process_are_json() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SET_UP], capture_output=True, text=True, check=True
    )
    hello, warning = map(json.loads, done.stderr.splitlines())
    assert (hello["message"], hello["logger"], hello["replica"]) == ("hello\nyou", "there", 1)
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "look out" in warning["message"]


def test_a_program_keeps_its_own_handlers() -> None:
    code = "import logging; logging.basicConfig(format='mine %(message)s');" + SET_UP
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "UserWarning: look out" in done.stderr
    assert "{" not in done.stderr
