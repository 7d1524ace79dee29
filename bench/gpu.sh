#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one command and 8 minutes: ceilings, tests, parity with
# transformers, kernel and engine sweeps, traces, predictions, HTTP. Needs a python3 with torch, triton,
# transformers and pytest with pytest-timeout (it names what is missing); neither minserve nor the
# network.
#
#   bench/gpu.sh [--out DIR]     # default DIR: bench/results; writes <device>.json and .log
#   bench/gpu.sh --stages engine,kernels   # these alone, in that order, where time is short, into a
#                                          # file of their own; the names are ceilings, tests, parity,
#                                          # kernels, engine, http and ranks
#   bench/gpu.sh --tune          # a second call, of 3 minutes: other tiles for attention
#   bench/gpu.sh --dry           # the same on a CPU, tiny, in Triton's interpreter
#
# PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/parts/gpu/stages.py "$@"
