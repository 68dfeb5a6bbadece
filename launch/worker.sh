#!/usr/bin/env bash
# What tpu_pod.sh runs on each worker of a slice. The program does not hang on the connection that asked for it: it goes on if that
# breaks, and a second call with the same number follows it again.
#   launch/worker.sh NUMBER ARGUMENT...  runs the program unless NUMBER was run already, follows its log, and exits with its code
#   launch/worker.sh install EXTRAS      dmd_jax with EXTRAS of setup.py; such machines have Python 3.10, and uv brings a newer one
#   launch/worker.sh stop                SIGTERM, by which the program saves and ends
set -euo pipefail
case ${1:-} in '' | --help) sed -n '2,6s/^# //p' "$0" && exit ;; esac
cd "$(dirname "$0")/.."
mkdir -p run
python=${PYTHON:-.venv/bin/python}

alive() { # whether the last run is; after a reboot its number may be another program's
  pid=$(cat run/pid 2>/dev/null) && grep -qs dmd_jax.main "/proc/$pid/cmdline"
}

stop() {
  local i
  alive || return 0
  pkill -TERM --parent "$pid" || true # the program, and not what it started
  for ((i = 0; i < 300; i++)); do
    alive || return 0
    sleep 1
  done
  kill -KILL -- "-$pid"
}

install() {
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python=3.12 .venv
  uv pip install --quiet --python=.venv/bin/python -e ".[$1]"
}

case $1 in
  stop) stop; exit ;;
  install) install "$2"; exit ;;
esac
number=$1 && shift
if [[ $(cat run/number 2>/dev/null) != "$number" ]]; then
  stop
  rm -f run/code
  touch run/log
  stat -c %s run/log >run/begin
  # shellcheck disable=SC2016  # in a session of its own the shell waits for the program and keeps its code
  setsid bash -c '"$@"; echo $? >run/code' dmd_jax "$python" -m dmd_jax.main "$@" >>run/log 2>&1 </dev/null &
  echo $! >run/pid
  echo "$number" >run/number
fi
tail --pid="$(cat run/pid)" --bytes=+"$(($(cat run/begin) + 1))" --follow run/log
exit "$(cat run/code 2>/dev/null || echo 137)" # without a code the shell was killed too
