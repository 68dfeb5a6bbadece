#!/usr/bin/env bash
# GPUs under SLURM, one process per GPU, from the root of the repository; options of sbatch win over those in this file:
#   sbatch --nodes=4 launch/gpu_slurm.sh [--python=PATH] -- --config=configs/coco.py --workdir=/shared/run
#   bash launch/gpu_slurm.sh --dry_run -- --config=configs/coco.py --workdir=/shared/run
# 120 s ahead of the limit the processes get SIGTERM, save and exit with 75, and the job is queued again; `scancel --signal=TERM JOB` does
# the same by hand, and `scancel JOB` ends it for good. After a signal all processes start again within the job.
#   --python=PATH  python (or PYTHON)
#   --dry_run      prints the commands and runs nothing
#SBATCH --job-name=dmd_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
. "${SLURM_SUBMIT_DIR:-.}/launch/functions.sh" # the job runs a copy of this file elsewhere
parse "python" "$@"
need_program
: "${python:=python}"
[[ -n ${SLURM_JOB_ID:-}$dry_run ]] || die "not within a job; submit it: sbatch launch/gpu_slurm.sh -- ..."
trap : TERM # `scancel JOB` sends it to this shell too, which is to wait for the processes

ask() { # the state of this job and the time that is left, again where a call fails
  local i
  for ((i = 0; i < 5; i++)); do
    squeue --noheader --job="$SLURM_JOB_ID" --format="%T %L" && return
    sleep "$PAUSE"
  done
  echo "squeue does not answer; queued again" >&2 && echo "RUNNING 0:00"
}

attempt() {
  local code=0 state left
  # Not --kill-on-bad-exit: the first to exit with 75 would end the others while they save. srun does not take over --cpus-per-task.
  call srun --wait=120 --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "$python" -m dmd_jax.main "${program[@]}" || code=$?
  if ((code != 75 && code < 128)); then return "$code"; fi
  read -r state left < <(ask)
  # Less than five minutes left: one that died while the others saved hides their 75.
  if ((code != 75)) && [[ $left != [0-4]:?? ]]; then return "$code"; fi
  # A job that is being cancelled is COMPLETING; to requeue it would bring it back.
  if [[ $state == RUNNING ]]; then call scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
}

restart attempt
[[ -z $dry_run ]] || echo "scontrol requeue \"\$SLURM_JOB_ID\"  # after exit code 75"
