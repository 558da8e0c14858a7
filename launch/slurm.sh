#!/usr/bin/env bash
# Submits a run to Slurm: one process a node, each with all GPUs of its node, put back in the queue until it has ended.
#   ./launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 -- train --config=configs/sdxl.py:diffusion_dpo --workdir=/shared/dpo
#   ./launch/slurm.sh --nodes=1 --gpus_per_node=4 --partition=a100 --sbatch=--account=me -- train --config=... --workdir=...
# --nodes=1 --gpus_per_node=8 (0: CPUs only) --time=HH:MM:SS --partition=NAME --name=alignment_jax
# --sbatch=OPTION  one more option of sbatch, as often as wanted; --cpus-per-task is one that many clusters need
# --dry_run        prints the command and runs nothing
# To be run in the checkout on a disk that all nodes see; the workdir must be on one too. PYTHON is .venv/bin/python.
# Two minutes before its time is up the run saves and the job goes back into the queue; one that is preempted saves as well.
set -euo pipefail

help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
fail() { echo "slurm.sh: $*; see ./launch/slurm.sh --help" >&2; exit 2; }

if [ "${1:-}" = --in_job ]; then  # sbatch runs this same file on the first node
  gpus=$2; shift 2
  # under Slurm jax gives each process one GPU, unless it is told which ones
  if [ "$gpus" != 0 ]; then JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1))); export JAX_LOCAL_DEVICE_IDS; fi
  [ "$SLURM_JOB_NUM_NODES" = 1 ] || export ALIGNMENT_JAX_DISTRIBUTED=1
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun asks for one CPU otherwise
  late='' told=''
  trap 'late=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # to the steps, not to this shell
  trap 'told=1' TERM                                         # preemption and scancel: the steps have got it too
  srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m alignment_jax "$@" & step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done  # a signal interrupts a wait
  code=0; wait "$step" || code=$?
  if [ "$code" = 2 ]; then exit 2; fi  # a mistake in the command or its config, which starting again does not mend
  # a preempted job that ends before Slurm kills it counts as complete and is not put back; so it waits for that
  if [ -n "$told" ]; then sleep "${KILL_WAIT:-600}" & wait; fi
  if [ -n "$late" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
nodes=1 gpus=8 name=alignment_jax options=() dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus_per_node=*) gpus=${1#*=} ;;
    --time=* | --partition=*) options+=("$1") ;;
    --name=*) name=${1#*=} ;;
    --sbatch=*) options+=("${1#*=}") ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; allowed are --nodes --gpus_per_node --time --partition --name --sbatch --dry_run, then -- train ARGS" ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes is '$nodes', it has to be a number from 1; try --nodes=2"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus_per_node is '$gpus', it has to be a number from 0; try --gpus_per_node=8"
[[ ${1:--} != -* ]] || fail "no command after --, received '${*}'; try -- train --config=... --workdir=..."
[ "$gpus" = 0 ] || options=("--gpus-per-node=$gpus" ${options[@]+"${options[@]}"})

submit=(sbatch "--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1 ${options[@]+"${options[@]}"} --requeue --signal=B:USR1@120
  --open-mode=append --output=slurm-%j.log launch/slurm.sh --in_job "$gpus" "$@")
if [ -n "$dry_run" ]; then printf '%q ' "${submit[@]}"; echo; else "${submit[@]}"; fi
