"""How the ``minserve`` command ends, for shells and scripts."""

from __future__ import annotations

import signal

# An error that was explained on stderr.
EXIT_ERROR = 1
# A command line, or a workload, that cannot be run.
EXIT_USAGE = 2
# Ctrl-C.
EXIT_INTERRUPTED = 128 + signal.SIGINT
