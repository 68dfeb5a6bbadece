#!/usr/bin/env bash
# The GPUs of this machine, from the root of the repository:
#   launch/gpu_local.sh [--dry_run] -- --config=configs/coco.py --workdir=/data/run
#   launch/gpu_local.sh --processes=8 -- --config=configs/coco.py --workdir=/data/run
# Runs it again after a preemption (75) and after a signal (128 or more); all processes together. SIGTERM and Ctrl-C: saves and ends.
#   --processes=N  with one GPU each; without it one process has all GPUs, which is as fast and simpler (or PROCESSES)
#   --port=PORT    at which the processes meet; 8476 (or PORT)
#   --python=PATH  python (or PYTHON)
#   --dry_run      prints the commands and runs nothing
set -euo pipefail
. "$(dirname "$0")/functions.sh"
parse "processes port python" "$@"
need_program
: "${processes:=1}" "${port:=8476}" "${python:=python}"
[[ $processes =~ ^[1-9][0-9]*$ && $port =~ ^[1-9][0-9]*$ ]] || die "processes is $processes and port $port; expected numbers from 1."
GRACE=${GRACE:-120} # seconds for the others to end after the first
stopped='' pids=()

stop() {
  stopped=1
  ((!${#pids[@]})) || kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop TERM INT

start() { # COMMAND...: in the background
  quoted "$@" >&3
  [[ -z $dry_run ]] || return 0
  "$@" &
  pids+=($!)
}

attempt() { # all processes, once; the code is that of the first that failed, for the others fail because of it
  local i pid left first status code=0 deadline=''
  pids=()
  for ((i = 0; i < processes; i++)); do
    if ((processes == 1)); then start "$python" -m dmd_jax.main "${program[@]}" && break; fi
    start env "JAX_LOCAL_DEVICE_IDS=$i" "$python" -m dmd_jax.main "${program[@]}" \
      "--coordinator_address=localhost:$port" "--num_processes=$processes" "--process_id=$i"
  done
  while ((${#pids[@]})); do
    left=() first=$code
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then left+=("$pid") && continue; fi
      status=0
      wait "$pid" || status=$?
      if ((first == 0 && status > code)); then code=$status; fi
    done
    pids=("${left[@]}")
    if ((code)) && [[ -z $deadline ]]; then deadline=$((SECONDS + GRACE)); fi
    if ((code && SECONDS >= deadline && ${#pids[@]})); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
    ((!${#pids[@]})) || sleep 0.2
  done
  return "$code"
}

restart attempt
