#!/usr/bin/env bash
# A popax command as several processes on this host, which talk over loopback.
#
# Config: any of configs/runs/*.gin; TrainConfig.slots is a multiple of the devices of all processes together.
# A process that loses another one ends itself; started again, the same command continues from what is in --out.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
local.sh [options] -- POPAX_COMMAND ARGUMENTS...

options
  --processes N           how many (default 2)
  --devices D             CPU devices of each process (default: whatever a process finds)
  --python PATH           of the environment that popax is installed in (default $POPAX_PYTHON, or python)
  --dry-run               print each process's command, start none

example
  launch/local.sh --processes 2 --devices 4 \
    -- train --gin_file configs/runs/irc_ubuntu_users.gin --base runs/base --data messages.jsonl.gz --out runs/irc --no_table
TEXT
}

PROCESSES=2 DEVICES='' PYTHON=${POPAX_PYTHON:-python}
POPAX=()

parse() {
  while (($# > 0)); do
    case $1 in
      --processes | --devices | --python) take_value "$1" "${@:2:1}" && shift 2 ;;
      --dry-run) DRY_RUN=true && shift ;;
      --help) usage && exit 0 ;;
      --) shift && POPAX=("$@") && break ;;
      *) die "unexpected '$1': options, then --, then the popax command; see $PROGRAM --help" ;;
    esac
  done
}

check() {
  whole_number --processes "$PROCESSES" 1
  if [[ -n $DEVICES ]]; then whole_number --devices "$DEVICES" 1; fi
  check_popax here "${POPAX[@]}"
  need_tool "$PYTHON"
}

free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# words INDEX PORT -> WORDS, the command of one process
words() {
  WORDS=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$2" "JAX_NUM_PROCESSES=$PROCESSES" "JAX_PROCESS_ID=$1")
  if [[ -n $DEVICES ]]; then
    WORDS+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES")
  fi
  WORDS+=("$PYTHON" -m popax.cli "${POPAX[@]}" "$DISTRIBUTED")
}

CHILDREN=()
# shellcheck disable=SC2329  # called by traps
end_all() { ((${#CHILDREN[@]} == 0)) || kill -"$1" "${CHILDREN[@]}" 2>/dev/null || true; }

# The code of the first that failed; a signal that this script hands on interrupts `wait`, which is then repeated.
wait_for_all() {
  local code=0 child status
  for child in "${CHILDREN[@]}"; do
    while true; do
      status=0
      wait "$child" || status=$?
      kill -0 "$child" 2>/dev/null || break
    done
    ((code != 0)) || code=$status
  done
  CHILDREN=()
  return "$code"
}

main() {
  parse "$@"
  check
  local index port=PORT
  $DRY_RUN || port=$(free_port)
  trap 'end_all TERM' TERM
  trap 'end_all INT' INT
  trap 'end_all KILL' EXIT
  for ((index = 0; index < PROCESSES; index++)); do
    words "$index" "$port"
    if $DRY_RUN; then
      run "${WORDS[@]}"
    else
      "${WORDS[@]}" &
      CHILDREN+=($!)
    fi
  done
  wait_for_all
}

main "$@"
