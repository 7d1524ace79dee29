"""`vllm bench serve` by its own functions.

The command `vllm` looks its version up under the name of vLLM's GPU package, which is not the one
for CPUs, and ends there.
"""

from __future__ import annotations

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
