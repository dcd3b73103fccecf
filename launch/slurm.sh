#!/usr/bin/env bash
# A popax command on GPU nodes under Slurm: a batch job of one process a GPU (or a node), which goes on after it was
# preempted, lost a node, or ran out of time.
#
# Config: any of configs/runs/*.gin; TrainConfig.slots is a multiple of the number of GPUs, since users are spread over
# them. `popax plan` compiles for TPUs alone and says nothing of GPUs.
#
# Slurm sends SIGTERM --grace seconds before the time limit: all processes save the same step and end, and the job puts
# itself into the queue again. The same command then continues from what is in --out.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
slurm.sh --nodes N --gpus_per_node G --time LIMIT [options] -- POPAX_COMMAND ARGUMENTS...

options
  --nodes N               nodes of the job
  --gpus_per_node G       on each of them
  --time LIMIT            as sbatch takes it, such as 12:00:00
  --one_process_a NAME    gpu (default) or node
  --name NAME             of the job (default popax)
  --partition P, --account A, --cpus_per_task C
  --popax PATH            the popax of an environment that all nodes see (default popax)
  --log FILE              of all attempts (default popax-%j.log)
  --max_restarts N        how often the job comes again (default 20)
  --grace SECONDS         between SIGTERM and the time limit (default 120)
  --dry-run               print the command and the job's script, submit none

example
  launch/slurm.sh --nodes 2 --gpus_per_node 8 --time 12:00:00 --partition gpu --popax ~/popax-env/bin/popax \
    -- train --gin_file configs/runs/irc_ubuntu_users.gin --base /shared/base --data /shared/messages.jsonl.gz \
    --out /shared/runs/irc --no_table
TEXT
}

NODES='' GPUS_PER_NODE='' TIME='' ONE_PROCESS_A=gpu NAME=popax PARTITION='' ACCOUNT='' CPUS_PER_TASK='' PATH_OF_POPAX=popax
LOG=popax-%j.log MAX_RESTARTS=20 GRACE=120
POPAX=()

parse() {
  while (($# > 0)); do
    case $1 in
      --nodes | --gpus_per_node | --time | --one_process_a | --name | --partition | --account | --cpus_per_task | --log | --max_restarts | --grace)
        take_value "$1" "${@:2:1}" && shift 2
        ;;
      --popax) need_value "$1" "${@:2:1}" && PATH_OF_POPAX=$2 && shift 2 ;;
      --dry-run) DRY_RUN=true && shift ;;
      --help) usage && exit 0 ;;
      --) shift && POPAX=("$@") && break ;;
      *) die "unexpected '$1': options, then --, then the popax command; see $PROGRAM --help" ;;
    esac
  done
}

check() {
  need_option --nodes "$NODES"
  need_option --gpus_per_node "$GPUS_PER_NODE"
  need_option --time "$TIME"
  whole_number --nodes "$NODES" 1
  whole_number --gpus_per_node "$GPUS_PER_NODE" 1
  whole_number --max_restarts "$MAX_RESTARTS" 0
  whole_number --grace "$GRACE" 1
  if [[ -n $CPUS_PER_TASK ]]; then whole_number --cpus_per_task "$CPUS_PER_TASK" 1; fi
  dns_label --name "$NAME"
  [[ $TIME =~ ^([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}$ ]] || die "--time '$TIME': minutes, HH:MM:SS or D-HH:MM:SS"
  [[ $ONE_PROCESS_A == gpu || $ONE_PROCESS_A == node ]] || die "--one_process_a '$ONE_PROCESS_A': gpu or node"
  check_popax here "${POPAX[@]}"
}

# The job's script, with all values in it: Slurm runs a copy of it, far from this file.
job() {
  local devices=''
  # Under Slurm jax gives a process the one device that has its local number, unless told otherwise.
  if [[ $ONE_PROCESS_A == node ]]; then devices="export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((GPUS_PER_NODE - 1)))"; fi
  cat <<TEXT
#!/usr/bin/env bash
set -uo pipefail
$devices
srun --kill-on-bad-exit=0 $(quoted "$PATH_OF_POPAX" "${POPAX[@]}" "$DISTRIBUTED")
code=\$?
restarts=\${SLURM_RESTART_COUNT:-0}
case \$code in
  ${EXITS_TO_REPEAT// / | })
    if ((restarts < $MAX_RESTARTS)); then
      echo "popax ended with \$code; into the queue again (\$((restarts + 1)) of $MAX_RESTARTS)"
      scontrol requeue "\$SLURM_JOB_ID"
      exit 0
    fi
    echo "popax ended with \$code after \$restarts restarts; raise --max_restarts, and submit the same command again"
    ;;
esac
exit "\$code"
TEXT
}

main() {
  parse "$@"
  check
  need_tool sbatch
  local tasks=1 options script
  if [[ $ONE_PROCESS_A == gpu ]]; then tasks=$GPUS_PER_NODE; fi
  # TERM without B: goes to the processes of srun, not to the script that waits for them.
  options=(--job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$tasks" --gpus-per-node="$GPUS_PER_NODE" --time="$TIME"
    --signal="TERM@$GRACE" --requeue --open-mode=append --output="$LOG")
  if [[ -n $PARTITION ]]; then options+=(--partition="$PARTITION"); fi
  if [[ -n $ACCOUNT ]]; then options+=(--account="$ACCOUNT"); fi
  if [[ -n $CPUS_PER_TASK ]]; then options+=(--cpus-per-task="$CPUS_PER_TASK"); fi
  script=$(job)
  if $DRY_RUN; then
    quoted sbatch "${options[@]}"
    printf " <<'JOB'\n%s\nJOB\n" "$script"
    return
  fi
  sbatch "${options[@]}" <<<"$script"
}

main "$@"
