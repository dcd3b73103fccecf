# shellcheck shell=bash
# What the launchers share: errors that name the fix, --dry-run, and the popax command that they start.
# Sourced, never run.
# shellcheck disable=SC2034  # what is set here is used there

PROGRAM=$(basename "$0")
DRY_RUN=false
# What makes `popax` one of several processes that jax finds by itself.
DISTRIBUTED=--distributed
# The commands that several processes can run together.
POPAX_COMMANDS='train generate'
# How a run ends that goes on when the same command is repeated: another process was lost, Ctrl-C, SIGTERM.
EXITS_TO_REPEAT='75 130 143'

die() {
  printf '%s: error: %s\n' "$PROGRAM" "$*" >&2
  exit 2
}

say() {
  printf '%s: %s\n' "$PROGRAM" "$*" >&2
}

# The words as one line that a shell reads back as the same words; plain words stay plain.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${line# }"
}

# Run the words, or print them under --dry-run.
run() {
  if $DRY_RUN; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Whether a run that ended with this code goes on when it is started again.
to_repeat() {
  [[ " $EXITS_TO_REPEAT " == *" $1 "* ]]
}

need_tool() {
  $DRY_RUN || command -v "$1" >/dev/null || die "$1 is not on PATH: install it, or see the commands with --dry-run"
}

# need_value OPTION [VALUE]
need_value() {
  [[ $# -eq 2 && -n $2 && $2 != --* ]] || die "$1 needs a value, got '${2-}'; see $PROGRAM --help"
}

# take_value OPTION [VALUE]: into the variable of the option's name, --a_b into A_B.
take_value() {
  need_value "$@"
  local variable=${1#--}
  printf -v "${variable^^}" '%s' "$2"
}

# need_option OPTION VALUE: an option without which nothing can be started.
need_option() {
  [[ -n $2 ]] || die "$1 is missing; see $PROGRAM --help for an example"
}

# whole_number OPTION VALUE LEAST
whole_number() {
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then die "$1 '$2': a whole number of at least $3"; fi
}

# dns_label OPTION VALUE: what clouds and clusters take as a name.
dns_label() {
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "$1 '$2': lower-case letters, digits and -, at most 40, first a letter, last no -"
}

# check_popax here|there COMMAND ARGUMENT...: refuse before anything is rented what popax would refuse on every machine.
# there: the machines have popax's own configs, and no other file of this directory; an absolute path is theirs.
check_popax() {
  local place=$1
  shift
  (($# > 0)) || die "no popax command: end with -- and one of: $POPAX_COMMANDS, and its arguments"
  [[ " $POPAX_COMMANDS " == *" $1 "* ]] || die "popax $1: give one of: $POPAX_COMMANDS"
  local configs previous='' word
  configs=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/configs
  for word in "$@"; do
    if [[ $previous == --gin_file ]]; then
      if [[ $place == here ]]; then
        [[ -f $word || -f $configs/${word#configs/} ]] || die "--gin_file $word: no such file, here or in $configs"
      else
        [[ $word == /* || -f $configs/${word#configs/} ]] ||
          die "--gin_file $word: not in $configs; name one there, or an absolute path on the machines"
      fi
    fi
    previous=$word
  done
  if [[ $1 == train ]]; then
    [[ " $* " == *' --out '* ]] || die "popax train needs --out DIR, in a place that all machines share and that outlasts them"
    [[ " $* " == *' --no_table '* ]] || die "popax train: several processes make no table; add --no_table, run popax eval later"
  fi
}

# set_topology KIND:AxBxC, as PlanConfig.topology has it -> KIND, SHAPE, CHIPS
set_topology() {
  [[ $1 =~ ^(v4|v5e|v5p|v6e|tpu7x):([1-9][0-9]*(x[1-9][0-9]*){1,2})$ ]] ||
    die "--topology '$1': KIND:AxB or KIND:AxBxC, KIND one of v4 v5e v5p v6e tpu7x, such as v5p:4x4x2"
  KIND=${BASH_REMATCH[1]} SHAPE=${BASH_REMATCH[2]}
  CHIPS=$((${SHAPE//x/*}))
  local axes=${SHAPE//[^x]/}
  case $KIND in
    v5e | v6e) ((${#axes} == 1)) || die "--topology $1: $KIND has two axes, such as $KIND:4x4" ;;
    *) ((${#axes} == 2)) || die "--topology $1: $KIND has three axes, such as $KIND:2x2x2" ;;
  esac
}
