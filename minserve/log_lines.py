"""Log records as lines: text for people, or a JSON object a line for programs.

Part of a message may come from a client. So in both formats a record is one line, with a bound on
its length: line breaks and control characters are escaped. Only a traceback takes further lines of
text, which are indented, so that none of them looks like a record.
"""

from __future__ import annotations

import json
import logging
import select
import sys
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, TextIO

# Characters of a message, and of a traceback, beyond which they are cut.
MAX_MESSAGE = 4096
MAX_TRACEBACK = 16384
CUT = "... (cut)"
# Characters that a pipe takes at once if it takes any: Linux says so of 4096 bytes.
PIECE = 1024
# Milliseconds in which a stream's reader may catch up before lines are lost.
PATIENCE_MS = 50
_LOST = {"name": __name__, "levelname": "WARNING", "levelno": logging.WARNING}


class Event(ABC):
    """A message with fields of its own, which programs read by their names.

    ``str`` gives its text, which has no line breaks.

    Attributes:
        name: the message in JSON.
    """

    __slots__ = ()
    name = ""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """Return the fields, by name; the names are always the same ones."""


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes records to a stream, and loses them where nobody reads it.

    A pipe that is full would block the thread that logs, which may be the one that serves everybody.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._num_lost = 0
        self._poll: select.poll | None = None
        with suppress(OSError, ValueError, AttributeError):  # not all streams are files
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            self._poll = poll

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; if the stream does not take it soon, count it as lost."""
        try:
            text = self.format(record)
            if self._num_lost and self._is_ready():
                lost = f"{self._num_lost} lines were lost: nobody has read the log"
                self._num_lost = 0
                self._write(self.format(logging.makeLogRecord({**_LOST, "msg": lost})))
            self._write(text)
        except Exception:
            self.handleError(record)

    def _write(self, text: str) -> None:
        text += self.terminator
        for start in range(0, len(text), PIECE):
            if not self._is_ready():
                self._num_lost += 1
                return
            self.stream.write(text[start : start + PIECE])
            self.stream.flush()

    def _is_ready(self) -> bool:
        """Return whether a piece can be written; waits a moment unless that was in vain lately."""
        return self._poll is None or bool(self._poll.poll(0 if self._num_lost else PATIENCE_MS))


class TextLines(logging.Formatter):
    """Lines such as ``12:03:04 INFO shutting down``.

    Args:
        where: words between the level and the message.
    """

    def __init__(self, where: str = "") -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._where = where

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record, self.datefmt)} {record.levelname} {self._where}"
        line += one_line(record.getMessage())
        for text in _tracebacks(self, record):
            line += "".join(f"\n  {one_line(part)}" for part in text.splitlines())
        return line


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII.

    It has ``time`` (UTC), ``level``, ``logger`` and ``message``; ``exception`` where there is one; and
    ``replica`` in the process of a replica. The fields of an `Event` follow.

    Args:
        replica: the number of the replica that this process runs.
    """

    def __init__(self, replica: int | None = None) -> None:
        super().__init__()
        self._own = {} if replica is None else {"replica": replica}

    def format(self, record: logging.LogRecord) -> str:
        event = record.msg if isinstance(record.msg, Event) else None
        message = record.getMessage() if event is None else event.name
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(_valid(message), MAX_MESSAGE),
            **self._own,
        }
        if text := "\n".join(_tracebacks(self, record)):
            line["exception"] = _valid(text)
        if event is not None:
            line |= event.fields()
        return _ENCODER.encode(line)


def set_up_logs(form: str = "text", *, replica: int | None = None) -> None:
    """Send the log records of this process to stderr, unless somebody else has set logs up.

    A second call changes the format.

    Args:
        form: ``text`` or ``json``. With JSON, the warnings of Python's own become records too.
        replica: the number of the replica that this process runs.
    """
    is_json = form == "json"
    where = "" if replica is None else f"replica {replica}: "
    logging.basicConfig(level=logging.INFO, handlers=[LineHandler(sys.stderr)])
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LineHandler):
            handler.setFormatter(JsonLines(replica) if is_json else TextLines(where))
            logging.captureWarnings(is_json)


def one_line(text: str) -> str:
    """Return a text with a bound on its length, in which all that is not printable is escaped."""
    text = _cut(text, MAX_MESSAGE)
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else _escape(c) for c in text])


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _tracebacks(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    texts = []
    if record.exc_info:
        texts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        texts.append(formatter.formatStack(record.stack_info))
    # What was raised is told at the end, so the beginning is left out.
    return [one if len(one) <= MAX_TRACEBACK else CUT + one[-MAX_TRACEBACK:] for one in texts]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + CUT


def _valid(text: str) -> str:
    """Return a text without lone surrogates, for which other programs' JSON has no place."""
    return text.encode("utf-8", "backslashreplace").decode()


def _utc(seconds: float) -> str:
    thousandths = int(seconds * 1000)
    whole, rest = divmod(thousandths, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{rest:03d}Z"


# All other characters are written as escapes, which no reader of lines takes for the end of one.
_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))
