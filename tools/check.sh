#!/usr/bin/env bash
# The one command before a commit: lint, format, types and the fast tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ruff check .
ruff format --check .
mypy
python -m pytest -q -m "not slow and not upstream and not gpu"
