"""The process of a rank whose weights are random, as those of rank 0 are in `random_weights`."""

from __future__ import annotations

import os
import sys

from minserve.engine.ranks.follower_process import main
from shared.synthetic_models import random_weights

if __name__ == "__main__":
    with random_weights("auto"):
        code = main(*sys.argv[1:])
    os._exit(code)
