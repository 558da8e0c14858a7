#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs, through gcloud: tpu_vm.sh {create,install,run,logs,delete,keep} NAME [flags]
#   ./launch/tpu_vm.sh create pod --accelerator_type=v5litepod-16 --zone=us-west4-a --spot
#   ./launch/tpu_vm.sh keep pod --accelerator_type=v5litepod-16 --zone=us-west4-a --spot -- train --config=... --workdir=/shared/dpo
# create   asks for the slice: --accelerator_type=v5litepod-16 [--runtime_version=VERSION] [--spot]; logs tells when it is there
# install  copies what HEAD holds to all workers and makes the environment there (the extra tpu); again after every commit
# run      starts the command (-- train ...) on all workers and returns; one that fails is started again, [--retries=3] times, and
#          goes on; one that ends with 2, a mistake in the command or its config, is not
# logs     the state of the slice and the last lines of each worker's log
# delete   gives the slice back, and all that is on its disks
# keep     create, install and run in one, with the flags of all, and anew when the slice is taken back; it looks every [--every=60]
#          seconds until the run has ended with 0 or 2. Ctrl-C ends keep alone; started again, it takes up what it finds.
# All: --zone=ZONE --project=PROJECT (else gcloud's own), --dry_run (prints the commands and runs nothing).
# The workdir must be on a disk that all workers share, such as Filestore or a bucket that is mounted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
fail() { echo "tpu_vm.sh: $*; see ./launch/tpu_vm.sh --help" >&2; exit 2; }
quote() { local word tick="'\\''"; for word; do if [[ $word =~ ^[-A-Za-z0-9_=:./,@%+]+$ ]]; then printf '%s ' "$word"; else printf "'%s' " "${word//\'/$tick}"; fi; done; }
run() { if [ -n "$dry_run" ]; then quote "$@"; echo; else "$@"; fi; }
# without --ssh-flag a worker that is gone would be waited for, for hours
on() { run gcloud compute tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2" --ssh-flag=-oServerAliveInterval=30 ${place[@]+"${place[@]}"}; }
resource() { run gcloud compute tpus queued-resources "$1" "$name" "${@:2}" ${place[@]+"${place[@]}"}; }

case ${1:-} in
  --help | -h) help ;;
  create | install | run | logs | delete | keep) action=$1 ;;
  *) fail "unknown subcommand '${1:-}'; allowed are create install run logs delete keep; try create NAME --accelerator_type=v5litepod-16" ;;
esac
name=${2:-}
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "$action needs the NAME of the slice next, received '$name'; lower-case letters, digits and -; try $action pod"
shift 2

accelerator='' version='' spot=() place=() retries=3 every=60 dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help ;;
    --accelerator_type=*) accelerator=${1#*=} ;;
    --runtime_version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --zone=* | --project=*) place+=("$1") ;;
    --retries=*) retries=${1#*=} ;;
    --every=*) every=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; allowed are --accelerator_type --runtime_version --spot --zone --project --retries --every --dry_run, then -- train ARGS" ;;
  esac
  shift
done

if [[ $action == create || $action == keep ]]; then  # which image goes with which TPU: https://cloud.google.com/tpu/docs/runtimes
  case $accelerator in
    v5litepod-[1-9]*) image=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) image=v2-alpha-tpuv5 ;;
    v6e-[1-9]*) image=v2-alpha-tpuv6e ;;
    v2-[1-9]* | v3-[1-9]* | v4-[1-9]*) image=tpu-ubuntu2204-base ;;
    *) [ -n "$version" ] || fail "--accelerator_type is '$accelerator'; known are v5litepod-N (v5e), v5p-N, v6e-N, v4-N, v3-N, v2-N, such as v5litepod-16; a newer one needs --runtime_version too" ;;
  esac
  [ -n "$accelerator" ] || fail "$action needs --accelerator_type; try --accelerator_type=v5litepod-16"
fi
if [[ $action == run || $action == keep ]]; then
  [[ $retries =~ ^[0-9]+$ ]] || fail "--retries is '$retries', it has to be a number from 0; try --retries=3"
  [[ $every =~ ^[1-9][0-9]*$ ]] || fail "--every is '$every', it has to be a number of seconds from 1; try --every=60"
  [[ ${1:--} != -* ]] || fail "no command after --, received '${*}'; try -- train --config=... --workdir=..."
  [[ " $*" != *" --workdir=gs://"* ]] || fail "--workdir is a gs:// address, and a folder is needed; mount the bucket (gcsfuse) and name the folder, such as --workdir=/mnt/bucket/run"
fi
command=("$@")

# keep goes on when one of these fails, so each hands on the first failure itself
create() { resource create "--node-id=$name" "--accelerator-type=$accelerator" "--runtime-version=${version:-$image}" ${spot[@]+"${spot[@]}"}; }
install() {
  git diff --quiet HEAD || echo "note            HEAD is copied, without the changes that are not committed" >&2
  local archive=${TMPDIR:-/tmp}/alignment_jax_$name.tar.gz
  run git archive --format=tar.gz "--output=$archive" HEAD || return
  run gcloud compute tpus tpu-vm scp "$archive" "$name:alignment_jax.tar.gz" --worker=all ${place[@]+"${place[@]}"} || return
  run rm "$archive" || return
  # Ubuntu 22.04 has Python 3.10 only; modules that an earlier commit left behind would be imported
  on all 'set -e; command -v python3.12 >/dev/null || { sudo add-apt-repository -y ppa:deadsnakes/ppa; sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3.12-venv; }; mkdir -p alignment_jax; rm -rf alignment_jax/alignment_jax; tar -xzf alignment_jax.tar.gz -C alignment_jax; bash -c "source alignment_jax/launch/env.sh && prepare_env .venv tpu"'
}
start() {
  local again
  again="for try in \$(seq 0 $retries); do echo start \$try; .venv/bin/python -m alignment_jax $(quote "${command[@]}"); code=\$?; [ \$code != 2 ] || echo a mistake in the command or its config, not started again; echo ended with \$code; case \$code in 0 | 2) break ;; esac; sleep 30; done"
  on all "cd alignment_jax && export ALIGNMENT_JAX_DISTRIBUTED=1 JAX_COMPILATION_CACHE_DIR=\$PWD/.venv/jax_cache && if flock -n run.lock true; then nohup flock run.lock bash -c $(quote "$again")>run.log 2>&1 </dev/null & else echo 'a run is going on here, see logs' >&2; exit 1; fi"
}
state() { resource describe '--format=value(state.state)'; }
outcome() { on 0 'cd alignment_jax && if flock -n run.lock true; then tail -n 1 run.log; else echo going on; fi || echo no run'; }
delete() { resource delete --force --quiet; }

keep() {
  # known: gcloud has answered before, so that what fails is no mistake in the flags; started: on the slice that there is
  local said now last='' known='' started=''
  if [ -n "$dry_run" ]; then
    state; echo '# NONE'; create; echo '# ACTIVE'; outcome; install; start; echo '# SUSPENDING, SUSPENDED, FAILED'; delete
    return
  fi
  while :; do
    if said=$(state 2>&1); then known=1; elif [[ $said =~ NOT_FOUND|not\ found ]]; then said=NONE; fi
    now=$(grep -xE '[A-Z_]+' <<<"$said") || now="no answer: $said"
    if [ "$now" = ACTIVE ]; then now="ACTIVE, $(outcome 2>/dev/null | tail -n 1)" || now="ACTIVE, worker 0 does not answer"; fi
    [ "$now" = "$last" ] || echo "$(date '+%F %T') $name: $now"
    last=$now
    case $now in  # all states: https://cloud.google.com/tpu/docs/queued-resources; those that are not here pass by themselves
      NONE) started=''; if create; then known=1; else [ -n "$known" ] || return 1; fi ;;
      SUSPENDING | SUSPENDED | FAILED) started=''; delete || true ;;  # when it is gone the next round creates it
      "no answer: "*) [ -n "$known" ] || return 1 ;;
      "ACTIVE, worker 0 does not answer") ;;
      "ACTIVE, going on") started=1 ;;
      ACTIVE*)
        if [ -z "$started" ] || [ "$now" = "ACTIVE, no run" ]; then
          install && start && started=1
        elif [[ $now == "ACTIVE, ended with "[02] ]]; then
          echo "the slice is there until ./launch/tpu_vm.sh delete $name"
          return "${now##* }"
        else
          start || true  # no retry is left, or the host was started anew
        fi ;;
    esac
    sleep "$every"
  done
}

case $action in
  run) start ;;
  logs) state; on all 'hostname; tail -n 40 alignment_jax/run.log' ;;
  *) "$action" ;;
esac
