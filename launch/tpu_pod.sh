#!/usr/bin/env bash
# A slice of Cloud TPUs, from your own machine, where gcloud is set up:
#   launch/tpu_pod.sh up --tpu_name=dmd --zone=us-west4-a --accelerator_type=v5litepod-32 --runtime_version=v2-alpha-tpuv5-lite --spot=1 \
#     -- --config=configs/coco.py --workdir=gs://BUCKET/run
#   create waits for a queued resource, or uses a slice that is ready; install copies this tree to all workers; run runs the program there,
#   again after a preemption or a signal, on a new slice if that is gone; up: the three in a row; logs: of worker 0; stop: it saves; delete
# Values also from the environment: TPU_NAME, ZONE, PROJECT (else gcloud's), ACCELERATOR_TYPE, RUNTIME_VERSION, SPOT=1, EXTRAS (of setup.py;
# tpu,gcs), VALID_UNTIL_DURATION (of waiting, such as 6h), ENVIRONMENT (of the program, such as 'A=1 B="2 3"'). --dry_run only prints.
set -euo pipefail
. "$(dirname "$0")/functions.sh"
trap 'exit 130' INT; (($#)) || set -- --help # the workers go on
command=$1 && [[ $1 == --* ]] || shift
parse "tpu_name zone project accelerator_type runtime_version spot valid_until_duration extras environment" "$@" && need tpu_name zone
if [[ ${spot:-1} != 1 ]]; then die "spot is $spot; expected 1, or nothing."; fi
where=("--zone=$zone" ${project:+"--project=$project"})

tpus() { call gcloud compute tpus "$@" "${where[@]}"; }
on() { tpus tpu-vm ssh "$tpu_name" "--worker=$1" "--command=$2"; }                # WORKERS COMMAND
state() { tpus "$1" list "--filter=name~(^|/)$tpu_name\$" "--format=value($2)"; } # nothing if there is none

create() {
  need accelerator_type runtime_version && local node queue
  while node=$(state tpu-vm state) && queue=$(state queued-resources state.state); do
    case $node/$queue in
      READY/*) return ;;
      */FAILED) die "the request for $tpu_name failed: gcloud compute tpus queued-resources describe $(quoted "$tpu_name" "${where[@]}")" ;;
      PREEMPTED/* | TERMINATED/* | */SUSPENDED) tpus queued-resources delete "$tpu_name" --force --quiet || break ;;
      /) tpus queued-resources create "$tpu_name" "--node-id=$tpu_name" "--accelerator-type=$accelerator_type" ${spot:+--spot} \
        "--runtime-version=$runtime_version" ${valid_until_duration:+"--valid-until-duration=$valid_until_duration"} || break ;;
      *) echo "$tpu_name: slice ${node:-none}, request ${queue:-none}" >&2 && sleep "$PAUSE" ;;
    esac
    [[ -z $dry_run ]] || return 0
  done
  return 255
}

install() {
  local archive code=0 && archive=$(mktemp --suffix=.tar.gz)
  call tar -czf "$archive" --exclude=.git --exclude=.venv --exclude=__pycache__ --exclude=./run -C "$(dirname "$0")/.." . &&
    tpus tpu-vm scp "$archive" "$tpu_name:dmd_jax.tar.gz" --worker=all &&
    on all "mkdir -p dmd_jax && tar -xzf dmd_jax.tar.gz -C dmd_jax && dmd_jax/launch/worker.sh install ${extras:-tpu,gcs}" || code=$?
  rm -f "$archive" && return "$code"
}

attempt() { # gcloud gives the code of the first worker that failed, and 1 for failures of its own
  local code=0 node codes
  on all "cd dmd_jax && ${environment:+env $environment }$(quoted launch/worker.sh "$(date +%s)" "${program[@]}")" || code=$?
  if ((code)); then node=$(state tpu-vm state) || return 255; else return 0; fi
  if [[ $node != READY ]]; then if create && install; then return 75; else return 255; fi; fi
  if ((code < 75)) && { ! codes=$(on all "cat dmd_jax/run/code || echo 137") || grep -qE '(^|[^0-9])(75|1[2-9].|2..)$' <<<"$codes"; }; then
    return 137 # of another worker; one that cannot be asked was lost, too
  fi
  return "$code"
}

case $command in
  create | install) "$command" ;;
  run | up) need_program && { [[ $command == run ]] || { create && install; }; } && restart attempt ;;
  logs) on 0 "tail -n 100 -F dmd_jax/run/log" ;;
  stop) on all "dmd_jax/launch/worker.sh stop" ;;
  delete) tpus queued-resources delete "$tpu_name" --force --quiet ;;
  *) die "no sub-command $command; there are: create install run up logs stop delete." ;;
esac
