#!/usr/bin/env bash
# The one command before a commit: lint, format, types, generated tables and the fast tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ruff check .
ruff format --check .
mypy
python tools/pages/readme_tables.py --check
python -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile -m "not slow and not upstream and not gpu and not nightly"
