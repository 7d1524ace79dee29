"""``python -m minserve`` is ``minserve``."""

import sys

from minserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
