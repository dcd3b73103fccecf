#!/usr/bin/env bash
# A popax command as a JobSet on TPU slices of GKE: launch/gke_jobset.yaml with its blanks filled, given to kubectl.
#
# Config: configs/runs/*.gin with the same topology that `popax plan` was asked about, for example
# configs/runs/plan_qwen3_8b_v5e.gin for v5e:2x2 and configs/runs/kimi_k2_v5p.gin for v5p:4x4x2.
#
# The bucket is mounted at /bucket in every Pod: give --out, --base and --data there. The catalog may also be named
# gs://BUCKET/..., which is faster. Needs the JobSet controller, and the Cloud Storage FUSE driver of the cluster.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
gke_jobset.sh --name NAME --topology KIND:SHAPE --image IMAGE --bucket BUCKET [options] -- POPAX_COMMAND ARGUMENTS...

options
  --topology KIND:SHAPE   of one slice, as in popax plan: v4, v5e, v5p, v6e or tpu7x
  --image IMAGE           a container image in which popax[tpu] is installed
  --bucket BUCKET         mounted at /bucket: what outlasts the Pods
  --slices N              node pools of that topology (default 1)
  --chips_per_host N      of the node pool's machines (default 4, or all where the slice has fewer)
  --spot                  on spot nodes
  --namespace NS          (default: default)
  --service_account SA    of Kubernetes, allowed to use the bucket (default: default)
  --max_restarts N        after failures; disruptions do not count (default 20)
  --grace SECONDS         between SIGTERM and SIGKILL (default 120)
  --delete                delete the JobSet of that name instead (needs --name alone)
  --dry-run               print the manifest and the command, run none

example
  launch/gke_jobset.sh --name irc --topology v5e:4x4 --image us-docker.pkg.dev/my-project/popax/popax:1 --bucket my-bucket \
    -- train --gin_file configs/runs/irc_ubuntu_users.gin --base /bucket/base --data /bucket/messages.jsonl.gz \
    --catalog gs://my-bucket/catalog --out /bucket/runs/irc --no_table
TEXT
}

NAME='' TOPOLOGY='' IMAGE='' BUCKET='' SLICES=1 CHIPS_PER_HOST='' SPOT=false NAMESPACE=default SERVICE_ACCOUNT=default
MAX_RESTARTS=20 GRACE=120 DELETE=false
POPAX=()

parse() {
  while (($# > 0)); do
    case $1 in
      --name | --topology | --image | --bucket | --slices | --chips_per_host | --namespace | --service_account | --max_restarts | --grace)
        take_value "$1" "${@:2:1}" && shift 2
        ;;
      --spot) SPOT=true && shift ;;
      --delete) DELETE=true && shift ;;
      --dry-run) DRY_RUN=true && shift ;;
      --help) usage && exit 0 ;;
      --) shift && POPAX=("$@") && break ;;
      *) die "unexpected '$1': options, then --, then the popax command; see $PROGRAM --help" ;;
    esac
  done
}

check() {
  need_option --name "$NAME"
  dns_label --name "$NAME"
  dns_label --namespace "$NAMESPACE"
  if $DELETE; then return; fi
  need_option --topology "$TOPOLOGY"
  need_option --image "$IMAGE"
  need_option --bucket "$BUCKET"
  dns_label --service_account "$SERVICE_ACCOUNT"
  [[ $IMAGE =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || die "--image '$IMAGE': REGISTRY/NAME:TAG"
  [[ $BUCKET =~ ^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$ ]] || die "--bucket '$BUCKET': the bucket's name, without gs:// and folders"
  whole_number --slices "$SLICES" 1
  whole_number --max_restarts "$MAX_RESTARTS" 0
  whole_number --grace "$GRACE" 1
  set_topology "$TOPOLOGY"
  CHIPS_PER_HOST=${CHIPS_PER_HOST:-$((CHIPS < 4 ? CHIPS : 4))}
  whole_number --chips_per_host "$CHIPS_PER_HOST" 1
  ((CHIPS % CHIPS_PER_HOST == 0)) || die "--topology $TOPOLOGY has $CHIPS chips: no multiple of --chips_per_host $CHIPS_PER_HOST"
  check_popax there "${POPAX[@]}"
}

# The words as a JSON list, which is YAML too.
json_list() {
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die "argument '$word': no line breaks or control characters"
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]' "${list#, }"
}

manifest() {
  local accelerator selector text
  case $KIND in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    tpu7x) accelerator=tpu7x ;;
  esac
  selector="{cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $SHAPE"
  if $SPOT; then selector+=', cloud.google.com/gke-spot: "true"'; fi
  declare -A values=(
    [NAME]=$NAME [NAMESPACE]=$NAMESPACE [SLICES]=$SLICES [HOSTS]=$((CHIPS / CHIPS_PER_HOST)) [GRACE]=$GRACE
    [MAX_RESTARTS]=$MAX_RESTARTS [SERVICE_ACCOUNT]=$SERVICE_ACCOUNT [IMAGE]=$IMAGE [BUCKET]=$BUCKET
    [CHIPS_PER_HOST]=$CHIPS_PER_HOST [NODE_SELECTOR]="$selector}" [ARGS]=$(json_list "${POPAX[@]}" "$DISTRIBUTED")
  )
  text=$(<"$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml")
  # The arguments last: an @ inside them is no blank.
  for name in NAME NAMESPACE SLICES HOSTS GRACE MAX_RESTARTS SERVICE_ACCOUNT IMAGE BUCKET CHIPS_PER_HOST NODE_SELECTOR ARGS; do
    text=${text//"@$name@"/"${values[$name]}"}
  done
  printf '%s\n' "$text"
}

main() {
  parse "$@"
  check
  need_tool kubectl
  if $DELETE; then
    run kubectl delete jobset "$NAME" --namespace="$NAMESPACE"
    return
  fi
  local filled
  filled=$(manifest)
  if $DRY_RUN; then
    printf '%s\n---\n' "$filled"
    printf '# %s\n' "$(quoted kubectl apply -f -)"
    return
  fi
  kubectl apply -f - <<<"$filled"
  say "logs: kubectl logs --namespace=$NAMESPACE -f -l jobset.sigs.k8s.io/jobset-name=$NAME -c popax --prefix"
  say "delete: $PROGRAM --name $NAME --namespace $NAMESPACE --delete"
}

main "$@"
