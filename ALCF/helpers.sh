# shellcheck shell=bash
# Finds or makes the Python environment, and loads the modules of the machines we know.
# Sourced by train_alcf.sh and tests/run.sh, in the project's folder. Computes nothing of a run.

# Prints the machine's name in lower case, empty where it is not one with modules to load.
# megatron/launch/machines.py knows more of each; a test keeps the two in step.
machine_name() {
  local host=${1:-$(hostname)}
  case "${PBS_O_HOST:-}" in sirius*) echo sirius && return ;; esac
  case "${NERSC_HOST:-}" in perlmutter*) echo perlmutter && return ;; esac
  case "${LMOD_SYSTEM_NAME:-}" in frontier*) echo frontier && return ;; esac
  case "$host" in
    sirius*) echo sirius ;;
    aurora* | x4[0-9][0-9][0-9]c*s*b*n* | *.aurora.alcf.anl.gov) echo aurora ;;
    sunspot* | uan[0-9]* | uan-[0-9]* | x1[0-9][0-9][0-9]c*s*b*n* | *.sunspot.alcf.anl.gov) echo sunspot ;;
    polaris* | x3[0-9][0-9][0-9]c*s*b*n* | *.polaris.alcf.anl.gov) echo polaris ;;
    sophia*) echo sophia ;;
    perlmutter* | *.perlmutter.nersc.gov) echo perlmutter ;;
    frontier*) echo frontier ;;
  esac
}

# Loads the machine's Python and communication libraries, where there are modules.
load_modules() {
  local machine
  machine=$(machine_name)
  [[ -n "$machine" ]] || return 0
  if [[ -d /soft && "$machine" != perlmutter && "$machine" != frontier ]]; then
    # Compute nodes of ALCF reach the network only so.
    export http_proxy="${http_proxy-http://proxy.alcf.anl.gov:3128}"
    export https_proxy="${https_proxy-http://proxy.alcf.anl.gov:3128}"
  fi
  type module >/dev/null 2>&1 || return 0
  # An environment that the user has activated stays.
  [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] || return 0
  echo "loading the modules of $machine"
  set +u # module files use variables that are not set
  case "$machine" in
    aurora | sunspot) module load frameworks ;;
    polaris | sirius)
      module use /soft/modulefiles
      module load conda && conda activate base
      aws_plugin
      ;;
    sophia)
      module use /soft/modulefiles
      module load conda && conda activate base
      ;;
    perlmutter) module load pytorch ;;
    frontier) module load rocm ;;
  esac || echo "warning: the modules of $machine could not be loaded" >&2
  set -u
}

# NCCL over Polaris' network, only where NCCL_NET="AWS Libfabric" asks for it: it is faster, but runs
# of this kind have hung with it. Variables that are set stay, and nothing else is ever set.
aws_plugin() {
  local plugin=${1:-/soft/libraries/aws-ofi-nccl/v1.9.1-aws/lib}
  [[ "${NCCL_NET:-}" == "AWS Libfabric" ]] || return 0
  if [[ ! -d "$plugin" ]]; then
    echo "warning: NCCL_NET=$NCCL_NET, but there is no $plugin" >&2
    return 0
  fi
  export NCCL_NET
  export NCCL_CROSS_NIC="${NCCL_CROSS_NIC-1}" NCCL_COLLNET_ENABLE="${NCCL_COLLNET_ENABLE-1}"
  export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL-PHB}"
  export LD_LIBRARY_PATH="$plugin:/soft/libraries/hwloc/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  echo "NCCL uses $plugin, as NCCL_NET asks (unset NCCL_NET: without it)"
}

# Interpreters to try, one per line, the user's own first.
python_candidates() {
  local name
  if [[ -n "${VIRTUAL_ENV:-}" ]]; then echo "$VIRTUAL_ENV/bin/python"; fi
  if [[ -n "${CONDA_PREFIX:-}" ]]; then echo "$CONDA_PREFIX/bin/python"; fi
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    command -v "$name" || true
  done
}

# Prints the interpreter's own path if it is a Python >= 3.10: the candidate may be a slow wrapper.
recent_python() {
  "$1" -I -S -c 'import sys; sys.version_info < (3, 10) and sys.exit(1); print(sys.executable)' 2>/dev/null
}

# Sets PYTHON to a Python >= 3.10, whatever is installed in it.
find_python() {
  local candidate attempt
  for attempt in as_is with_modules; do
    if [[ $attempt == with_modules ]]; then load_modules; fi
    for candidate in $(python_candidates) .venv/bin/python; do
      if PYTHON=$(recent_python "$candidate"); then return 0; fi
    done
  done
  echo "error: there is no Python >= 3.10 on PATH: install one, or activate an environment that has it" >&2
  return 2
}

# Whether an interpreter has packages, by name; looks without importing them.
has_packages() {
  local python=$1
  shift
  "$python" - "$@" >/dev/null 2>&1 <<'PY'
import sys
from importlib.util import find_spec

sys.exit(sys.version_info < (3, 10) or any(find_spec(name) is None for name in sys.argv[1:]))
PY
}

# Sets PYTHON to one with torch, deepspeed and what else is named: the active one if it has them,
# else .venv, which is made from the requirements once.
#   setup_python REQUIREMENTS... [-- PACKAGE...]
setup_python() {
  local requirements=() packages=(torch deepspeed) candidate
  while [[ $# -gt 0 && $1 != -- ]]; do
    requirements+=("$1")
    shift
  done
  [[ $# -eq 0 ]] || packages+=("${@:2}")
  load_modules
  for candidate in $(python_candidates); do
    if has_packages "$candidate" "${packages[@]}"; then
      PYTHON=$(recent_python "$candidate")
      print_missing "$candidate"
      return 0
    fi
  done
  make_environment "${requirements[@]}"
  PYTHON=$PWD/.venv/bin/python
}

# Prints what the user's environment lacks, in case the run needs it.
print_missing() {
  local name missing=()
  for name in numpy safetensors sentencepiece transformers; do
    has_packages "$1" "$name" || missing+=("$name")
  done
  if [[ ${#missing[@]} -gt 0 ]]; then
    echo "note: $1 has no ${missing[*]}; if the run needs it: $1 -m pip install ${missing[*]}"
  fi
}

# Makes or completes .venv. A file in it, written last, names the requirements that are installed,
# so that an interrupted or outdated one is completed.
make_environment() {
  if is_made "$@"; then return 0; fi
  lock_environment
  is_made "$@" || install_environment "$@" || {
    unlock_environment
    return 1
  }
  unlock_environment
}

readonly MADE_FROM=.venv/made-from

# Whether .venv works and holds all these requirements.
is_made() {
  local line
  [[ -f $MADE_FROM ]] && recent_python .venv/bin/python >/dev/null || return 1
  while read -r line; do
    grep -qxF "$line" "$MADE_FROM" || return 1
  done < <(fingerprints "$@")
}

install_environment() {
  local log=$PWD/.venv-setup.log file arguments=() began=$SECONDS
  for file in "$@"; do arguments+=(-r "$file"); done
  echo "making the Python environment .venv from $* with $PYTHON (once; some minutes; log: $log)"
  if [[ ! -f $MADE_FROM ]] || ! recent_python .venv/bin/python >/dev/null; then
    "$PYTHON" -m venv --clear .venv >"$log" 2>&1 || {
      setup_failed "$log" "on Debian and Ubuntu: apt install python3-venv"
      return 1
    }
  fi
  # No compiler is needed: DeepSpeed builds its operators only where they are used.
  DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    .venv/bin/python -m pip install "${arguments[@]}" >>"$log" 2>&1 || {
    setup_failed "$log" "it needs the network or a mirror (PIP_INDEX_URL) and some GB of disk; run it again to resume"
    return 1
  }
  {
    for file in requirements*.txt; do
      # What was installed before and is not among these stays noted.
      [[ " $* " == *" $file "* ]] || grep -F " $file" "$MADE_FROM" 2>/dev/null || true
    done
    fingerprints "$@"
  } >"$MADE_FROM.new"
  mv "$MADE_FROM.new" "$MADE_FROM"
  echo "the environment is made ($((SECONDS - began)) s)"
}

setup_failed() {
  tail -n 15 "$1" >&2
  echo "error: the Python environment could not be made, see $1. Hint: $2" >&2
}

# One line per file, which changes with its contents.
fingerprints() {
  "$PYTHON" - "$@" <<'PY'
import hashlib
import pathlib
import sys

for name in sys.argv[1:]:
    print(hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest(), name)
PY
}

# One set-up at a time: a folder can be made only once. A lock whose owner is gone is taken over.
lock_environment() {
  local owner printed=""
  until mkdir .venv.lock 2>/dev/null; do
    owner=$(cat .venv.lock/owner 2>/dev/null || true)
    if [[ -n "$owner" && "${owner%% *}" == "$(hostname)" ]] && ! kill -0 "${owner##* }" 2>/dev/null; then
      rm -rf .venv.lock
      continue
    fi
    if [[ -z "$printed" ]]; then echo "waiting for another set-up of .venv (${owner:-starting}; or remove .venv.lock)"; fi
    printed=1
    sleep 1
  done
  echo "$(hostname) $$" >.venv.lock/owner
  trap unlock_environment EXIT
}

unlock_environment() {
  rm -rf .venv.lock
  trap - EXIT
}
