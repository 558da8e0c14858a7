#!/usr/bin/env bash
# Lint, types and all tests of the quick tier; --all adds the slow tier. Further arguments go to pytest.
# TEST_PROCESSES (2): how many processes the tests are spread over; each takes up to 4 GB, mostly to compile.
source "$(dirname "$0")/env.sh"
tier=(); if [ "${1:-}" = --all ]; then shift; tier=(-m "slow or not slow"); fi
prepare_env .venv dev
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist worksteal "${tier[@]}" "$@"
