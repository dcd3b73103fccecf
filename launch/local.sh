#!/usr/bin/env bash
# Several processes of one popax command on this host: local.sh [--processes N] [--devices D] [--dry-run] -- COMMAND ...
# D: host devices a process, on CPU (default: whatever the process finds). A process that loses another one ends itself.
set -euo pipefail

usage() { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }

processes=2 devices="" dry_run=false
while (($#)); do
  case $1 in
    --processes) processes=${2:?}; shift 2 ;;
    --devices) devices=${2:?}; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    --) shift; break ;;
    *) usage ;;
  esac
done
(($#)) || usage
[[ $processes =~ ^[1-9][0-9]*$ && $devices =~ ^[0-9]*$ ]] || usage

python=${POPAX_PYTHON:-python}
free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
port=PORT
$dry_run || port=$(free_port)
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
if [[ -n $devices ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi

if $dry_run; then
  for ((index = 0; index < processes; index++)); do
    printf 'JAX_COORDINATOR_ADDRESS=%s JAX_NUM_PROCESSES=%s JAX_PROCESS_ID=%s ' "$JAX_COORDINATOR_ADDRESS" "$processes" "$index"
    [[ -z $devices ]] || printf 'JAX_PLATFORMS=cpu XLA_FLAGS=%q ' "$XLA_FLAGS"
    printf '%q ' "$python" -m popax.cli "$@" --distributed
    printf '\n'
  done
  exit 0
fi

children=()
# shellcheck disable=SC2329  # called by traps
end_all() { ((${#children[@]} == 0)) || kill -"$1" "${children[@]}" 2>/dev/null || true; }
trap 'end_all TERM' TERM
trap 'end_all INT' INT
trap 'end_all KILL' EXIT
for ((index = 0; index < processes; index++)); do
  JAX_PROCESS_ID=$index "$python" -m popax.cli "$@" --distributed &
  children+=($!)
done

# The code of the first that failed; a signal that this script hands on interrupts `wait`, which is then repeated.
code=0
for child in "${children[@]}"; do
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  ((code != 0)) || code=$status
done
children=()
exit "$code"
