#!/usr/bin/env bash
# Makes the environment and runs the tests; further arguments go to pytest.
#   ./runtests.sh            all but the slow ones
#   ./runtests.sh -m slow    the slow ones: the whole quickstart
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
exec .venv/bin/python -m pytest "$@"
