# shellcheck shell=bash
# Sourced by the scripts beside it (bash 4.4): flags, commands that are printed, and running again where that helps.

PAUSE=${PAUSE:-10} # seconds between two runs
FAST=${FAST:-600}  # seconds; a failure sooner than that may well come again
LIMIT=${LIMIT:-5}  # fast failures in a row

die() { echo "error: $*" >&2 && exit 2; }

usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 && /^# / { print substr($0, 3) }' "$0"; } # the comment at its top

parse() { # "NAME ..." ARGUMENT...: variables from --name=value or else from $NAME, dry_run, and the array program: all after --
  local name names=" $1 "
  for name in $1; do printf -v "$name" %s "$(printenv "${name^^}" || true)"; done
  dry_run='' program=()
  while shift && (($#)); do
    name=${1#--} name=${name%%=*}
    case $1 in
      --) program=("${@:2}") && break ;;
      --help) usage && exit ;;
      --dry_run) dry_run=1 ;;
      --*=*)
        [[ $names == *" $name "* ]] || die "no flag --$name; there are:${names}dry_run help."
        printf -v "$name" %s "${1#*=}" ;;
      *) die "$1 is not --flag=value; arguments of the program come after --." ;;
    esac
  done
  if [[ -n $dry_run ]]; then exec 3>&1; else exec 3>&2; fi # where commands are printed
}

need() { # NAME...: of variables that must have a value
  local name
  for name; do [[ -n ${!name:-} ]] || die "no $name; give --$name=... or set ${name^^}."; done
}

need_program() { ((${#program[@]})) || die "no arguments of the program; give them last: -- --config=configs/digits.py --workdir=..."; }

quoted() { # COMMAND...: as one line that can be pasted into a shell
  local word words=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  echo "${words[*]}"
}

call() { quoted "$@" >&3 && { [[ -n $dry_run ]] || "$@"; }; } # COMMAND...: prints it, and runs it unless this is a dry run

restart() { # COMMAND...: again after 75 (saved) and after a signal; returns 0 or the code of a failure that would come again
  local code began failures=0
  while :; do
    code=0 began=$SECONDS
    "$@" || code=$?
    if ((code != 75 && code < 128)) || [[ -n ${stopped:-} ]]; then return "$code"; fi
    if ((SECONDS - began >= FAST)); then failures=0; fi
    if ((code != 75 && ++failures >= LIMIT)); then die "exit code $code, and $failures failures in a row within $FAST s; not run again."; fi
    echo "exit code $code: again in $PAUSE s" >&2
    sleep "$PAUSE"
    [[ -z ${stopped:-} ]] || return "$code"
  done
}
