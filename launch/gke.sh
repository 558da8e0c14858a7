#!/usr/bin/env bash
# Trains on Kubernetes: fills launch/jobset.yaml in and gives it to kubectl. The cluster needs JobSet and Kueue; one made by xpk has both.
#   ./launch/gke.sh dpo --image=IMAGE --tpu_type=v5litepod-16 --claim=runs -- train --config=configs/sdxl.py:diffusion_dpo --workdir=/shared/dpo
#   ./launch/gke.sh dpo --image=IMAGE --nodes=2 --gpus_per_node=8 --gpu_type=nvidia-h100-80gb --claim=runs -- train --config=... --workdir=/shared/dpo
# --image=IMAGE    in which `python -m alignment_jax` runs
# TPU: --tpu_type=v5litepod-16 --slices=1    GPU: --nodes=1 --gpus_per_node=8 [--gpu_type=LABEL of cloud.google.com/gke-accelerator]
# --claim=NAME     a PersistentVolumeClaim that all pods can write, seen as /shared: where the workdir has to be to survive a restart
# --queue=multislice-queue  Kueue's local queue     --max_restarts=10     --namespace=NAME
# --dry_run        prints the manifest and runs nothing
# shellcheck disable=SC2016,SC2089,SC2090
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

help() { sed -n '/^# shellcheck/d; 2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
fail() { echo "gke.sh: $*; see ./launch/gke.sh --help" >&2; exit 2; }

case ${1:-} in --help | -h) help ;; esac
export NAME=${1:-} IMAGE='' QUEUE=multislice-queue MAX_RESTARTS=10 SLICES=1 HOSTS=1 DEVICES=''
# Kueue and node pools append to a JobSet's name, of which labels allow 63 characters
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] || fail "the NAME comes first, received '$NAME'; up to 28 lower-case letters, digits and -; try dpo"
shift
tpu='' gpu='' claim='' where=() dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help ;;
    --image=*) IMAGE=${1#*=} ;;
    --tpu_type=*) tpu=${1#*=} ;;
    --slices=*) SLICES=${1#*=} ;;
    --nodes=*) HOSTS=${1#*=} ;;
    --gpus_per_node=*) DEVICES=${1#*=} ;;
    --gpu_type=*) gpu=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --queue=*) QUEUE=${1#*=} ;;
    --max_restarts=*) MAX_RESTARTS=${1#*=} ;;
    --namespace=*) where=("$1") ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; allowed are --image --tpu_type --slices --nodes --gpus_per_node --gpu_type --claim --queue --max_restarts --namespace --dry_run, then -- train ARGS" ;;
  esac
  shift
done
[ -n "$IMAGE" ] || fail "no --image; try --image=us-docker.pkg.dev/PROJECT/REPOSITORY/alignment_jax"
for n in "$SLICES" "$HOSTS" "${DEVICES:-1}" "$MAX_RESTARTS"; do [[ $n =~ ^[0-9]+$ ]] || fail "'$n' is not a number; --slices, --nodes, --gpus_per_node and --max_restarts are"; done
[ "$SLICES" -gt 0 ] && [ "$HOSTS" -gt 0 ] && [ "${DEVICES:-1}" -gt 0 ] || fail "--slices, --nodes and --gpus_per_node are numbers from 1, received $SLICES, $HOSTS and ${DEVICES:-none}"
[ -z "$tpu" ] || [ -z "$DEVICES$gpu" ] || fail "--tpu_type and GPUs in one run; take one of them"
[ -n "$tpu$DEVICES" ] || fail "neither --tpu_type nor --gpus_per_node; try --tpu_type=v5litepod-16 or --nodes=2 --gpus_per_node=8"
[[ ${1:--} != -* ]] || fail "no command after --, received '${*}'; try -- train --config=... --workdir=/shared/..."
[[ " $*" != *" --workdir=gs://"* ]] || fail "--workdir is a gs:// address, and a folder is needed; name a --claim and a folder in it, such as --workdir=/shared/run"
[ -n "$claim" ] || echo "note            without --claim what the run saves is lost with its pod, and several hosts cannot save together" >&2

json() { "${PYTHON:-python3}" -c 'import json, sys; print(json.dumps(sys.argv[1:], ensure_ascii=False).replace("$", "$$"))' "$@"; }  # Kubernetes reads $
ARGS=$(json python -m alignment_jax "$@") PRIVILEGED=false ENV='[]' ANNOTATIONS='{}'
MOUNTS='{name: shm, mountPath: /dev/shm}' VOLUMES='{name: shm, emptyDir: {medium: Memory}}'
if [ -n "$claim" ]; then
  MOUNTS+=', {name: shared, mountPath: /shared}' VOLUMES+=", {name: shared, persistentVolumeClaim: {claimName: $claim}}"
fi
MOUNTS="[$MOUNTS]" VOLUMES="[$VOLUMES]"
if [ -n "$tpu" ]; then
  size=${tpu#*-}; [[ $size =~ ^[1-9][0-9]*$ ]] || size=0
  case $tpu in  # the number counts cores, of which a chip of v4 and v5p has two; hosts have four chips
    v5litepod-*) accelerator=tpu-v5-lite-podslice chips=$size ;;
    v6e-*) accelerator=tpu-v6e-slice chips=$size ;;
    v4-*[02468]) accelerator=tpu-v4-podslice chips=3d-$((size / 2)) ;;
    v5p-*[02468]) accelerator=tpu-v5p-slice chips=3d-$((size / 2)) ;;
    *) chips=unknown ;;
  esac
  case $chips in
    4) topology=2x2 ;; 8) topology=2x4 ;; 16) topology=4x4 ;; 32) topology=4x8 ;; 64) topology=8x8 ;; 128) topology=8x16 ;; 256) topology=16x16 ;;
    3d-4) topology=2x2x1 ;; 3d-8) topology=2x2x2 ;; 3d-16) topology=2x2x4 ;; 3d-32) topology=2x4x4 ;; 3d-64) topology=4x4x4 ;; 3d-128) topology=4x4x8 ;; 3d-256) topology=4x8x8 ;; 3d-512) topology=8x8x8 ;;
    *) fail "--tpu_type is '$tpu'; known are v5litepod-{4,8,16,32,64,128,256}, v6e-{4,8,16,32,64,128,256}, v4-{8,16,32,64,128,256,512,1024}, v5p-{8,16,32,64,128,256,512,1024}" ;;
  esac
  RESOURCE=google.com/tpu DEVICES=4 HOSTS=$((${chips#3d-} / 4)) PRIVILEGED=true
  NODE_SELECTOR="{cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $topology}"
  ANNOTATIONS='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'  # a slice is a node pool
  [ $((HOSTS * SLICES)) = 1 ] || ENV='[{name: ALIGNMENT_JAX_DISTRIBUTED, value: "1"}]'
else
  [ "$SLICES" = 1 ] || fail "--slices is $SLICES; GPUs have none, try --nodes=$SLICES"
  RESOURCE=nvidia.com/gpu NODE_SELECTOR="{${gpu:+cloud.google.com/gke-accelerator: $gpu}}"
  [ "$HOSTS" = 1 ] || ENV="[{name: JAX_COORDINATOR_ADDRESS, value: '$NAME-slice-0-0.$NAME:1234'}, {name: JAX_NUM_PROCESSES, value: '$HOSTS'}, {name: JAX_PROCESS_ID, valueFrom: {fieldRef: {fieldPath: 'metadata.annotations[''batch.kubernetes.io/job-completion-index'']'}}}]"
fi
export ARGS PRIVILEGED ENV ANNOTATIONS MOUNTS VOLUMES RESOURCE NODE_SELECTOR
manifest=$("${PYTHON:-python3}" -c 'import os, string; print(string.Template(open("launch/jobset.yaml").read()).substitute(os.environ))')
apply=(kubectl apply ${where[@]+"${where[@]}"} -f -)
if [ -n "$dry_run" ]; then printf '# %s\n%s\n' "${apply[*]}" "$manifest"; else "${apply[@]}" <<<"$manifest"; fi
