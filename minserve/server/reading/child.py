"""The process in which large bodies are read: frames of calls come in, frames of results go out.

It ends when its parent closes the pipe or ends in any way.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any

from minserve.server.reading import frames


def main() -> None:
    """Serve the parent's calls until it has gone, with the niceness that is the argument."""
    # Frames alone go to the parent. What a library prints belongs into the log.
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Ctrl-C and SIGTERM may reach the whole group of processes, but requests go on for a while.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(int(sys.argv[1]))  # before any thread starts: on Linux each has its own
    # Templates and tokenizers work without torch, which would take seconds and 200 MB.
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with suppress(EOFError, BrokenPipeError):
        reader = _start(frames.read(inbox))
        while True:
            method, args = frames.read(inbox)
            result = _result(reader, method, args)
            # The parent ends a process of which a part may go on for ever.
            outbox.write(frames.pack((*result, reader.is_stuck)))
            outbox.flush()


def _start(facts: Any) -> Any:
    from minserve.server.reading.reader import Reader

    if facts.tokenizer.has_chat_template:
        # The first chat would wait for the template engine. A template may refuse this one.
        with suppress(Exception):
            facts.tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    return Reader(facts)


def _result(reader: Any, method: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Return whether a call succeeded, and its result or its error."""
    try:
        return True, getattr(reader, method)(*args)
    except Exception as error:
        return False, error


if __name__ == "__main__":
    main()
