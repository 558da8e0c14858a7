#!/usr/bin/env bash
# Aligns the shipped critters model with the default recipe, judges it and writes a report; about five minutes on two cores.
#   ./launch/quickstart.sh [--fresh] [--config.FIELD=VALUE ...]
source "$(dirname "$0")/env.sh"
run=runs/quickstart
if [ "${1:-}" = --fresh ]; then shift; rm -rf "$run"; fi
if [ -f "$run/report.html" ]; then
  echo "done already    open $run/report.html, or start anew with ./launch/quickstart.sh --fresh"
  exit 0
fi
prepare_env .venv critters
"$PYTHON" -m alignment_jax train --config=configs/critters.py:default --workdir="$run" "$@"
