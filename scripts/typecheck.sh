#!/usr/bin/env bash
# Checks the types of the package with mypy, strictly, and the names, attributes and calls of the
# benchmarks, of which many lines run on a GPU alone; settings in pyproject.toml.
# mypy has to see the folders as they are installed, with kernels/ and models/ inside the
# package, so it is shown a folder of links.
set -euo pipefail
cd "$(dirname "$0")/.."

LINKS=.venv/typed/minserve
rm -rf "$LINKS"
mkdir -p "$LINKS"
ln -s "$PWD"/minserve/* "$PWD/kernels" "$PWD/models" "$LINKS"
PROGRAMS=()
for file in bench/*.py; do
    PROGRAMS+=(--module "$(basename "$file" .py)")
done
# What settings leave out of benchmarks are the types of values, which are those of JSON.
exec .venv/bin/mypy --package minserve --package parts --package shared "${PROGRAMS[@]}" "$@"
