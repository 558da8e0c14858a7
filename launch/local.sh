#!/usr/bin/env bash
# Several processes of one run on this machine, to try what a pod will do; every line of theirs begins with [process i].
#   ./launch/local.sh --processes=2 -- train --config=configs/critters.py:default --workdir=runs/two
#   ./launch/local.sh --processes=2 --devices=4 -- train --config=configs/critters.py:ddpo --workdir=runs/pod --config.steps=4
# --processes=2  how many           --devices=1  devices that each process sees on CPU
# --dry_run      prints the commands and runs nothing
# JAX_PLATFORMS is cpu unless it is set; PYTHON is .venv/bin/python. Ctrl-C and SIGTERM go to all; when one process fails the
# others are ended within seconds, and the exit code is that of the first that failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
GRACE=5  # seconds that the others get to end by themselves: inside a collective nobody hears a SIGTERM

help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
fail() { echo "local.sh: $*; see ./launch/local.sh --help" >&2; exit 2; }

processes=2 devices=1 dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help ;;
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; allowed are --processes=N --devices=N --dry_run, then -- train ARGS" ;;
  esac
  shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes is '$processes', it has to be a number from 1; try --processes=2"
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail "--devices is '$devices', it has to be a number from 1; try --devices=4"
[[ ${1:--} != -* ]] || fail "no command after --, received '${*}'; try -- train --config=... --workdir=..."

port=$((20000 + RANDOM % 12000))  # below the ports that Linux hands out by itself
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
command=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes")
rest=("$PYTHON" -m alignment_jax "$@")
if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do printf '%q ' "${command[@]}" "JAX_PROCESS_ID=$i" "${rest[@]}"; echo; done
  exit 0
fi
command -v "$PYTHON" >/dev/null || fail "no $PYTHON; make it with ./launch/quickstart.sh or ./launch/test.sh, or set PYTHON"

pids=() readers=()
signal_all() { for pid in "${pids[@]}"; do kill -"$1" "$pid" 2>/dev/null || true; done; }
trap 'signal_all INT' INT
trap 'signal_all TERM' TERM
set -m  # a process group each: the terminal's Ctrl-C comes here alone and is passed on, once
for ((i = 0; i < processes; i++)); do
  exec 9> >(trap '' INT TERM; while IFS= read -r line || [ -n "$line" ]; do printf '[process %d] %s\n' "$i" "$line"; done)
  readers+=($!)
  "${command[@]}" "JAX_PROCESS_ID=$i" "${rest[@]}" >&9 2>&1 9>&- &
  pids+=($!)
  exec 9>&-
done

first=0 deadline=
while [ ${#pids[@]} -gt 0 ]; do
  running=() failed=
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then running+=("$pid"); continue; fi
    code=0; wait "$pid" 2>/dev/null || code=$?
    kill -KILL -- "-$pid" 2>/dev/null || true  # what it started and left behind
    if [ "$code" != 0 ] && [ -z "$deadline" ]; then first=$code failed=1 deadline=$((SECONDS + GRACE)); fi
  done
  pids=(${running[@]+"${running[@]}"})
  [ ${#pids[@]} -gt 0 ] || break
  if [ -n "$failed" ]; then echo "local.sh: a process ended with $first, the others are ended" >&2; signal_all TERM; fi
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then signal_all KILL; fi
  sleep 0.2 || true
done
for reader in "${readers[@]}"; do  # their last lines
  for ((i = 0; i < 20; i++)); do if kill -0 "$reader" 2>/dev/null; then sleep 0.1; fi; done
done
exit "$first"
