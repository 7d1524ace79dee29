#!/usr/bin/env bash
# Checks the types of the package with mypy, strictly; settings in pyproject.toml.
# mypy has to see the folders as they are installed, with kernels/ and models/ inside the
# package, so it is shown a folder of links.
set -euo pipefail
cd "$(dirname "$0")/.."

LINKS=.venv/typed/minserve
rm -rf "$LINKS"
mkdir -p "$LINKS"
ln -s "$PWD"/minserve/* "$PWD/kernels" "$PWD/models" "$LINKS"
exec .venv/bin/mypy --package minserve "$@"
