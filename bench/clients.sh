#!/usr/bin/env bash
# Clients of other people against a live `minserve serve`, each in an environment of its own.
#
#   bench/clients.sh --list              # the clients, and what each one checks
#   bench/clients.sh                     # all of them: an hour, and some 15 GB below ~/.cache/minserve
#   bench/clients.sh litellm lm-eval     # some of them
#
# Installing needs the registries of Python, npm and Debian; running needs no network. What a client
# said is kept in bench/results/clients/NAME.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=bench exec "${PYTHON:-.venv/bin/python}" -m parts.clients.run "$@"
