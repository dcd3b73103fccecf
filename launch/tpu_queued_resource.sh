#!/usr/bin/env bash
# A TPU slice as a Cloud TPU queued resource: rented, popax installed on all its hosts, run, watched, given back.
#
# Config: configs/runs/*.gin with the same topology that `popax plan` was asked about, for example
# configs/runs/plan_qwen3_8b_v5e.gin for v5e:2x2 and configs/runs/kimi_k2_v5p.gin for v5p:4x4x2.
#
# popax runs as a systemd unit on each host: it outlives this shell's connection, and gets SIGTERM, and time to save,
# when the host is taken away. A slice that was taken away is deleted and requested again, and the same command
# continues from what the run had saved under --out.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
tpu_queued_resource.sh ACTION --name NAME --project P --zone Z [options] [-- POPAX_COMMAND ARGUMENTS...]

actions
  run      create, wait, install, start, and again after a preemption; delete at the end
  create   request the slice             wait    until it is ACTIVE
  install  popax on every host           start   the popax command on every host, until it ends
  logs     of every host                 delete  give the slice back

options
  --topology KIND:SHAPE   as in popax plan: v4, v5e, v5p or v6e (create, run)
  --runtime_version V     the hosts' image (default: the one for KIND)
  --spot                  cheaper, and may be taken away
  --package PATH          a wheel of popax, or its checkout (default: this checkout) (install, run)
  --setup COMMAND         run on every host first, to mount what outlasts the slice (install, run)
  --python NAME           the hosts' Python, installed where missing (default python3.11) (install, run)
  --max_restarts N        new slices or new starts before giving up (default 20)
  --poll SECONDS          between looks at the state (default 30)
  --grace SECONDS         between SIGTERM and SIGKILL (default 120)
  --keep                  do not delete the slice at the end
  --dry-run               print the commands, run none

example
  launch/tpu_queued_resource.sh run --name irc --project my-project --zone us-east5-a --topology v5p:2x2x2 --spot \
    --setup 'sudo mkdir -p /mnt/popax && sudo mount 10.0.0.2:/popax /mnt/popax' \
    -- train --gin_file configs/runs/irc_ubuntu_users.gin --base /mnt/popax/base --data /mnt/popax/messages.jsonl.gz \
    --catalog gs://my-bucket/catalog --out /mnt/popax/runs/irc --no_table
TEXT
}

NAME='' PROJECT='' ZONE='' TOPOLOGY='' RUNTIME_VERSION='' PACKAGE='' SETUP='' PYTHON=python3.11
SPOT=false KEEP=false MAX_RESTARTS=20 POLL=30 GRACE=120
POPAX=()
# What ssh ends with when the connection, not the command, failed.
SSH_LOST=255

parse() {
  [[ $# -gt 0 ]] || die "no action; one of: run create wait install start logs delete"
  ACTION=$1
  [[ $ACTION == --help ]] || shift
  while (($# > 0)); do
    case $1 in
      --name | --project | --zone | --topology | --runtime_version | --package | --setup | --python | --max_restarts | --poll | --grace)
        take_value "$1" "${@:2:1}" && shift 2
        ;;
      --spot) SPOT=true && shift ;;
      --keep) KEEP=true && shift ;;
      --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=true && shift ;;
      --) shift && POPAX=("$@") && break ;;
      -*) die "unknown option $1; see $PROGRAM --help" ;;
      *) die "unexpected '$1': options, then --, then the popax command; see $PROGRAM --help" ;;
    esac
  done
}

check() {
  [[ " run create wait install start logs delete " == *" $ACTION "* ]] ||
    die "unknown action $ACTION; one of: run create wait install start logs delete"
  need_option --name "$NAME"
  need_option --project "$PROJECT"
  need_option --zone "$ZONE"
  dns_label --name "$NAME"
  whole_number --max_restarts "$MAX_RESTARTS" 0
  whole_number --poll "$POLL" 1
  whole_number --grace "$GRACE" 1
  if [[ $ACTION == run || $ACTION == create ]]; then
    need_option --topology "$TOPOLOGY"
    set_topology "$TOPOLOGY"
    # TensorCores are counted, two a chip, except where a chip has one.
    case $KIND in
      v4) ACCELERATOR=v4-$((2 * CHIPS)) IMAGE=tpu-ubuntu2204-base ;;
      v5p) ACCELERATOR=v5p-$((2 * CHIPS)) IMAGE=v2-alpha-tpuv5 ;;
      v5e) ACCELERATOR=v5litepod-$CHIPS IMAGE=v2-alpha-tpuv5-lite ;;
      v6e) ACCELERATOR=v6e-$CHIPS IMAGE=v2-alpha-tpuv6e ;;
      *) die "--topology $TOPOLOGY: not offered as a queued resource here; use launch/gke_jobset.sh for $KIND" ;;
    esac
    RUNTIME_VERSION=${RUNTIME_VERSION:-$IMAGE}
  fi
  if [[ $ACTION == run || $ACTION == install ]]; then
    PACKAGE=${PACKAGE:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
    [[ -f $PACKAGE && $PACKAGE == *.whl || -f $PACKAGE/pyproject.toml ]] ||
      die "--package $PACKAGE: neither a wheel nor a checkout; make a wheel with: python -m build --wheel"
  fi
  if [[ $ACTION == run || $ACTION == start ]]; then
    check_popax there "${POPAX[@]}"
  elif ((${#POPAX[@]} > 0)); then
    die "$ACTION takes no popax command, got: ${POPAX[*]}"
  fi
  if [[ $ACTION == run ]] && $SPOT && [[ -z $SETUP ]]; then
    die "run --spot without --setup: --out would be lost with the slice; mount a place that outlasts it"
  fi
}

queued() { # queued VERB ARGUMENT...
  run gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

on_hosts() { # on_hosts COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

create() {
  local options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME_VERSION")
  if $SPOT; then options+=(--spot); fi
  queued create "${options[@]}"
}

state() {
  queued describe '--format=value(state.state)'
}

# Returns 0 once ACTIVE, 1 where the request will not become so.
wait_until_active() {
  if $DRY_RUN; then
    state
    return
  fi
  local now before=''
  while true; do
    # No answer is no state: the next look may have one.
    now=$(state) || now=UNKNOWN
    [[ $now == "$before" ]] || say "$NAME is $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    sleep "$POLL"
  done
}

install() {
  local copied=popax.tar.gz source=$PACKAGE
  if [[ -n $SETUP ]]; then on_hosts "$SETUP" || return; fi
  if [[ -f $PACKAGE ]]; then
    copied=$(basename "$PACKAGE")
  else
    source=${TMPDIR:-/tmp}/$NAME-$copied
    # What is committed, and nothing else: what runs can be named.
    run git -C "$PACKAGE" archive --prefix=popax/ -o "$source" HEAD || return
  fi
  run gcloud compute tpus tpu-vm scp "$source" "$NAME:$copied" --project="$PROJECT" --zone="$ZONE" --worker=all || return
  on_hosts "command -v $PYTHON >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy $PYTHON $PYTHON-venv; }" &&
    on_hosts "$PYTHON -m venv ~/popax-env && ~/popax-env/bin/pip install --quiet \"\$HOME/${copied}[tpu]\""
}

# A unit left over from a lost connection is stopped first: it saves, and the new one goes on from there.
start() {
  local unit=(sudo systemd-run --unit=popax --wait --collect --property=KillMode=mixed
    "--property=TimeoutStopSec=$GRACE")
  # $HOME and $(id -un) are the hosts', not this shell's.
  # shellcheck disable=SC2016
  local where='--uid="$(id -un)" --setenv=HOME="$HOME" --working-directory="$HOME"' \
    output='--property=StandardOutput="append:$HOME/popax.log" --property=StandardError="append:$HOME/popax.log"' \
    program='"$HOME/popax-env/bin/popax"'
  on_hosts "sudo systemctl stop popax 2>/dev/null; $(quoted "${unit[@]}") $where $output $program $(quoted "${POPAX[@]}" "$DISTRIBUTED")"
}

logs() {
  on_hosts 'tail -n 100 ~/popax.log'
}

delete() {
  queued delete --force --quiet
}

give_back() {
  if $KEEP; then
    say "kept $NAME; give it back with: $PROGRAM delete --name $NAME --project $PROJECT --zone $ZONE"
  else
    delete
  fi
}

# 0: done. 1: the slice was taken away. 2: popax was stopped on a slice that is still there. 3: it failed.
attempt() {
  create || return 3
  wait_until_active || return 1
  if ! install; then
    still_there || return 1
    return 3
  fi
  attempt_on_slice
}

attempt_on_slice() {
  local code=0
  start || code=$?
  if ((code == 0)); then return 0; fi
  # A host that is being taken away loses its connection some seconds before the slice's state says so.
  if ((code == SSH_LOST)); then run sleep "$POLL"; fi
  still_there || return 1
  if ((code == SSH_LOST)) || to_repeat "$code"; then return 2; fi
  say "popax ended with $code on a slice that is still there"
  return 3
}

still_there() {
  [[ $(state) == ACTIVE ]]
}

run_to_the_end() {
  local restarts=0 outcome=0
  attempt || outcome=$?
  while ((outcome == 1 || outcome == 2)); do
    ((restarts < MAX_RESTARTS)) || die "$NAME: stopped $((restarts + 1)) times, --max_restarts $MAX_RESTARTS; raise it, or do without --spot"
    restarts=$((restarts + 1))
    if ((outcome == 1)); then
      say "$NAME was taken away; start $((restarts + 1)) on a new slice"
      delete
      outcome=0
      attempt || outcome=$?
    else
      say "popax was stopped; start $((restarts + 1)) on the same slice"
      outcome=0
      attempt_on_slice || outcome=$?
    fi
  done
  if ((outcome != 0)); then
    say "failed; $NAME is kept for its logs: $PROGRAM logs --name $NAME --project $PROJECT --zone $ZONE, then delete"
    exit "$outcome"
  fi
  give_back
}

main() {
  parse "$@"
  check
  need_tool gcloud
  case $ACTION in
    run) run_to_the_end ;;
    wait) wait_until_active || die "$NAME will not become ACTIVE; delete it and create it again" ;;
    *) "$ACTION" ;;
  esac
}

main "$@"
