#!/usr/bin/env bash
# A Cloud TPU, from its creation to its end, with the same command on all of its workers:
#   bash launch/tpu_vm.sh [--dry-run] create | queue | setup | train [arguments] | status | logs
#                                     | stop | delete
# What it is, from the environment: TPU_NAME, TPU_ZONE, TPU_TYPE (such as v5litepod-16), TPU_VERSION
# (its software), TPU_WORKERS (its machines; asked for where unset), SPOT=yes to have it cheaper and
# preemptible, PROJECT. --dry-run prints every command and runs none.
set -euo pipefail
name=${TPU_NAME:-mimicnorm} zone=${TPU_ZONE:-us-central1-a} type=${TPU_TYPE:-v5litepod-16}
version=${TPU_VERSION:-v2-alpha-tpuv5-lite} dry=''
[ "${1:-}" = --dry-run ] && dry=yes && shift
action=${1:-nothing}
shift || true
if [[ ! ${TPU_WORKERS:-1} =~ ^[1-9][0-9]{0,4}$ ]]; then
  echo "error: TPU_WORKERS=$TPU_WORKERS is no whole number from 1 to 99999" >&2
  exit 2
fi
place=(--zone "$zone" ${PROJECT:+--project "$PROJECT"})
folder=mimicnorm-jax

run() {
  if [ "$dry" ]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

workers() {
  if [ -z "${TPU_WORKERS:-}" ]; then
    [ "$dry" ] && { echo "error: --dry-run asks nobody: set TPU_WORKERS" >&2; exit 1; }
    TPU_WORKERS=$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" \
      --format='value(networkEndpoints.len())')
  fi
  seq 0 $((TPU_WORKERS - 1))
}

# everywhere COMMAND: runs a command line on every worker at the same time; fails where one does
everywhere() {
  local worker process processes=() code=0 all
  all=$(workers)
  for worker in $all; do
    if [ "$dry" ]; then
      on_worker "$worker" "$1"
      continue
    fi
    on_worker "$worker" "$1" &
    processes+=($!)
  done
  for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || code=1; done
  return "$code"
}

on_worker() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

case $action in
  create)
    run gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" \
      --version="$version" ${SPOT:+--spot} ;;
  queue) # a request that is answered when there is room
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
      --accelerator-type="$type" --runtime-version="$version" ${SPOT:+--spot} ;;
  setup) # the checkout, and the environment, on every worker
    archive=$(mktemp -d)/source.tar.gz
    run git archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name":source.tar.gz "${place[@]}" --worker=all
    everywhere "mkdir -p $folder && tar xzf source.tar.gz -C $folder && cd $folder && \
{ (. launch/environment.sh && find_python >/dev/null) || \
{ sudo apt-get -qy update && sudo apt-get -qy install python3.11-venv; }; } && \
. launch/environment.sh && install tpu" ;;
  train) # goes on when the connection ends; logs follows it
    arguments=''
    [ $# -eq 0 ] || arguments=$(printf ' %q' "$@")
    everywhere "cd $folder && if grep -qs mimicnorm_jax.main /proc/\$(cat train.pid 2>/dev/null || echo 0)/cmdline; then \
echo 'error: it trains already; stop it first' >&2; exit 2; fi && (setsid nohup .venv/bin/python -m mimicnorm_jax.main \
--distributed=on$arguments >train.log 2>&1 </dev/null & echo \$! >train.pid)" ;;
  status)
    run gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state,health)'
    everywhere "cd $folder && kill -0 \$(cat train.pid) && echo training || tail -n 1 train.log" ;;
  logs)
    on_worker "${WORKER:-0}" "tail -n 100 -f $folder/train.log" ;;
  stop) # all workers save at the same step; train goes on from there
    everywhere "kill -TERM \$(cat $folder/train.pid)" ;;
  delete)
    if [ "${QUEUED:-}" ]; then
      run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
    else
      run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
    fi ;;
  *)
    echo "error: $action is none of create, queue, setup, train, status, logs, stop, delete; usage: bash launch/tpu_vm.sh [--dry-run] ACTION" >&2
    exit 2 ;;
esac
