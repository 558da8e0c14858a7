#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs, through gcloud: tpu_vm.sh {create,install,run,logs,delete} NAME [flags]
#   ./launch/tpu_vm.sh create pod --accelerator_type=v5litepod-16 --zone=us-west4-a --spot
#   ./launch/tpu_vm.sh run pod --zone=us-west4-a -- train --config=configs/sdxl.py:diffusion_dpo --workdir=/shared/dpo
# create   asks for the slice: --accelerator_type=v5litepod-16 [--runtime_version=VERSION] [--spot]; logs tells when it is there
# install  copies what HEAD holds to all workers and makes the environment there (the extra tpu); again after every commit
# run      starts the command on all workers and returns; one that fails is started again, [--retries=3] times, and goes on
# logs     the state of the slice and the last lines of each worker's log
# delete   gives the slice back, and all that is on its disks
# All: --zone=ZONE --project=PROJECT (else gcloud's own), --dry_run (prints the commands and runs nothing).
# The workdir must be on a disk that all workers share, such as Filestore or a bucket that is mounted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
fail() { echo "tpu_vm.sh: $*; see ./launch/tpu_vm.sh --help" >&2; exit 2; }
quote() { local word tick="'\\''"; for word; do if [[ $word =~ ^[-A-Za-z0-9_=:./,@%+]+$ ]]; then printf '%s ' "$word"; else printf "'%s' " "${word//\'/$tick}"; fi; done; }
run() { if [ -n "$dry_run" ]; then quote "$@"; echo; else "$@"; fi; }
everywhere() { run gcloud compute tpus tpu-vm ssh "$name" --worker=all "--command=$1" ${place[@]+"${place[@]}"}; }

case ${1:-} in
  --help | -h) help ;;
  create | install | run | logs | delete) action=$1 ;;
  *) fail "unknown subcommand '${1:-}'; allowed are create install run logs delete; try create NAME --accelerator_type=v5litepod-16" ;;
esac
name=${2:-}
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "$action needs the NAME of the slice next, received '$name'; lower-case letters, digits and -; try $action pod"
shift 2

accelerator='' version='' spot=() place=() retries=3 dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help ;;
    --accelerator_type=*) accelerator=${1#*=} ;;
    --runtime_version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --zone=* | --project=*) place+=("$1") ;;
    --retries=*) retries=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; allowed are --accelerator_type --runtime_version --spot --zone --project --retries --dry_run, then -- train ARGS" ;;
  esac
  shift
done

case $action in
  create)  # which image goes with which TPU: https://cloud.google.com/tpu/docs/runtimes
    case $accelerator in
      v5litepod-[1-9]*) image=v2-alpha-tpuv5-lite ;;
      v5p-[1-9]*) image=v2-alpha-tpuv5 ;;
      v6e-[1-9]*) image=v2-alpha-tpuv6e ;;
      v2-[1-9]* | v3-[1-9]* | v4-[1-9]*) image=tpu-ubuntu2204-base ;;
      *) [ -n "$version" ] || fail "--accelerator_type is '$accelerator'; known are v5litepod-N (v5e), v5p-N, v6e-N, v4-N, v3-N, v2-N, such as v5litepod-16; a newer one needs --runtime_version too" ;;
    esac
    [ -n "$accelerator" ] || fail "create needs --accelerator_type; try --accelerator_type=v5litepod-16"
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator" \
      "--runtime-version=${version:-$image}" ${spot[@]+"${spot[@]}"} ${place[@]+"${place[@]}"} ;;
  install)
    git diff --quiet HEAD || echo "note            HEAD is copied, without the changes that are not committed" >&2
    archive=${TMPDIR:-/tmp}/alignment_jax_$name.tar.gz
    run git archive --format=tar.gz "--output=$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:alignment_jax.tar.gz" --worker=all ${place[@]+"${place[@]}"}
    run rm "$archive"
    # Ubuntu 22.04 has Python 3.10 only; modules that an earlier commit left behind would be imported
    everywhere 'set -e; command -v python3.12 >/dev/null || { sudo add-apt-repository -y ppa:deadsnakes/ppa; sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3.12-venv; }; mkdir -p alignment_jax; rm -rf alignment_jax/alignment_jax; tar -xzf alignment_jax.tar.gz -C alignment_jax; bash -c "source alignment_jax/launch/env.sh && prepare_env .venv tpu"' ;;
  run)
    [[ $retries =~ ^[0-9]+$ ]] || fail "--retries is '$retries', it has to be a number from 0; try --retries=3"
    [[ ${1:--} != -* ]] || fail "no command after --, received '${*}'; try -- train --config=... --workdir=..."
    [[ " $*" != *" --workdir=gs://"* ]] || fail "--workdir is a gs:// address, and a folder is needed; mount the bucket (gcsfuse) and name the folder, such as --workdir=/mnt/bucket/run"
    again="for try in \$(seq 0 $retries); do echo start \$try; .venv/bin/python -m alignment_jax $(quote "$@")&& exit; echo ended with \$?; sleep 30; done"
    everywhere "cd alignment_jax && export ALIGNMENT_JAX_DISTRIBUTED=1 JAX_COMPILATION_CACHE_DIR=\$PWD/.venv/jax_cache && if flock -n run.lock true; then nohup flock run.lock bash -c $(quote "$again")>run.log 2>&1 </dev/null & else echo 'a run is going on here, see logs' >&2; exit 1; fi" ;;
  logs)
    run gcloud compute tpus queued-resources describe "$name" '--format=value(state.state)' ${place[@]+"${place[@]}"}
    everywhere 'hostname; tail -n 40 alignment_jax/run.log' ;;
  delete) run gcloud compute tpus queued-resources delete "$name" --force --quiet ${place[@]+"${place[@]}"} ;;
esac
