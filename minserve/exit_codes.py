"""How the ``minserve`` command ends, for shells and scripts."""

from __future__ import annotations

import signal

# An error that was explained on stderr.
EXIT_ERROR = 1
# A command line, or a workload, that cannot be run.
EXIT_USAGE = 2
# A replica's process: its controller takes it in on no account; the connection is lost, and a
# new process may join; the controller asks for a new process; an iteration has broken its engine.
EXIT_REFUSED = 3
EXIT_LOST = 4
EXIT_AGAIN = 5
EXIT_FAULT = 6
# A server whose only engine hung or broke; a new process may do better.
EXIT_HUNG = 7
# Ctrl-C.
EXIT_INTERRUPTED = 128 + signal.SIGINT
