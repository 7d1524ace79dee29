"""``minserve`` whose replicas have faults planted in them; see `planted_replica`."""

from __future__ import annotations

import sys

from minserve.cli.main import main
from minserve.controller import processes

processes.MODULE = "planted_replica"

if __name__ == "__main__":
    sys.exit(main())
