# shellcheck shell=bash
# For your shell, bash or zsh, in an interactive job:
#
#     source ALCF/helpers.sh          NHOSTS, NGPUS, NGPU_PER_HOST, HOSTFILE, DIST_LAUNCH and `launch`
#     ezpz_setup_env                  the machine's modules, Python with torch and DeepSpeed, the same
#     launch python3 -m my.program    on every device of the job
#
# It sets no option of your shell and never ends it. The names are those of ezpz, which is not needed.
# With --functions-only, for scripts in the project's folder (train_alcf.sh, tests/run.sh), it defines
# what finds or makes the Python environment and loads the modules of the machines we know. Computes
# nothing of a run.

MEGATRON_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")/.." && pwd)

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
  # An environment that the user has activated stays; one on top of a module needs it all the same.
  [[ -z "${CONDA_PREFIX:-}" ]] || return 0
  [[ -z "${VIRTUAL_ENV:-}" ]] || is_on_top "$VIRTUAL_ENV" || return 0
  echo "loading the modules of $machine"
  local flags=$-
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
  case $flags in *u*) set -u ;; esac
}

# Whether a virtual environment adds to another Python's packages.
is_on_top() {
  grep -qi 'include-system-site-packages *= *true' "$1/pyvenv.cfg" 2>/dev/null
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
  local name given
  if [[ -n "${VIRTUAL_ENV:-}" ]]; then echo "$VIRTUAL_ENV/bin/python"; fi
  if [[ -n "${CONDA_PREFIX:-}" ]]; then echo "$CONDA_PREFIX/bin/python"; fi
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    command -v "$name" || true
  done
  given=$(given_path)
  if [[ -n "$given" ]]; then PATH=$given command -v python3 || true; fi
}

# PATH as this process was given it: a login shell, as a job's script is, has set it anew since.
given_path() {
  local line
  [[ -r /proc/$$/environ ]] || return 0
  while IFS= read -r -d '' line; do
    case $line in PATH=*) echo "${line#PATH=}" ;; esac
  done </proc/$$/environ
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
# else .venv, which is made from the requirements once: on its own, or on a machine with modules on
# top of the Python there that has torch, of which only what is missing is installed.
#   setup_python REQUIREMENTS... [-- PACKAGE...]
setup_python() {
  local requirements=() packages=(torch deepspeed) candidate base=""
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
    if [[ -z "$base" ]] && has_packages "$candidate" torch; then base=$(recent_python "$candidate"); fi
  done
  if [[ -z "$(machine_name)" ]]; then
    base=""
  elif [[ -n "$base" ]]; then
    PYTHON=$base
  else
    require_wheels || return
  fi
  make_environment "${requirements[@]}" || return
  PYTHON=$PWD/.venv/bin/python
  [[ -z "$base" ]] || has_packages "$PYTHON" "${packages[@]}" || {
    echo "error: $PYTHON lacks one of ${packages[*]}: remove .venv, or activate an environment that has them" >&2
    return 2
  }
}

# PyPI's torch is for NVIDIA's devices: on other machines it would train on the host.
require_wheels() {
  case "$(machine_name)" in
    aurora | sunspot | frontier)
      echo "error: no Python with torch on $(machine_name), and PyPI's does not know its devices: load the module that has it (Aurora: module load frameworks), or activate your environment" >&2
      return 2
      ;;
  esac
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

MADE_FROM=.venv/made-from

# Whether .venv works and holds all these requirements.
is_made() {
  local line
  [[ -f $MADE_FROM ]] && recent_python .venv/bin/python >/dev/null || return 1
  while read -r line; do
    grep -qxF "$line" "$MADE_FROM" || return 1
  done < <(fingerprints "$@")
}

install_environment() {
  local log=$PWD/.venv-setup.log file arguments=() kind=() began=$SECONDS
  for file in "$@"; do arguments+=(-r "$file"); done
  if [[ -n "$base" ]]; then
    missing_only "$@" >.venv-requirements || return
    arguments=(-r .venv-requirements -c .venv-requirements.kept)
    kind=(--system-site-packages)
    echo "making .venv on top of $base, with what it lacks of $* (once; log: $log)"
  else
    echo "making the Python environment .venv from $* with $PYTHON (once; some minutes; log: $log)"
  fi
  if [[ ! -f $MADE_FROM ]] || ! recent_python .venv/bin/python >/dev/null; then
    "$PYTHON" -m venv --clear "${kind[@]+"${kind[@]}"}" .venv >"$log" 2>&1 || {
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

# Prints the requirements that the base's Python does not meet in any version: its own, torch before
# all, were built for the machine, and .venv-requirements.kept holds pip to them.
missing_only() {
  "$PYTHON" - "$@" <<'PY'
import pathlib
import re
import sys
from importlib.metadata import distributions

have = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
for name in sys.argv[1:]:
    for line in pathlib.Path(name).read_text().splitlines():
        package = re.match(r"[\w.-]+", line)
        if package and package[0].lower().replace("_", "-") not in {*have, "torch"}:
            print(line)
kept = [f"{name}=={have[name]}" for name in ("torch", "numpy", "triton") if name in have]
pathlib.Path(".venv-requirements.kept").write_text("\n".join(kept) + "\n")
PY
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
  echo "on top of ${base:-nothing}"
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

# ---- names of ezpz, for interactive shells

# Prints the machine's name, elsewhere the host's.
ezpz_get_machine_name() {
  local name
  name=$(machine_name)
  echo "${name:-$(hostname)}"
}

# Loads the machine's modules and puts a Python with torch and DeepSpeed first on PATH.
ezpz_setup_python() {
  local python
  load_modules
  # In a bash of its own: making an environment takes options and traps that are not this shell's.
  # shellcheck disable=SC2016
  python=$(bash -c 'set -euo pipefail; cd "$1"; source ALCF/helpers.sh --functions-only
    { find_python; setup_python requirements.txt; } >&2; echo "$PYTHON"' bash "$MEGATRON_ROOT") || return
  export PATH="${python%/*}:$PATH"
  if [[ -f "${python%/bin/*}/pyvenv.cfg" ]]; then export VIRTUAL_ENV="${python%/bin/*}"; fi
  echo "python: $python"
}

# Exports what describes the job.
ezpz_setup_job() {
  local settings
  settings=$(megatron_launch env) || return
  # shellcheck source=/dev/null
  source /dev/stdin <<<"$settings"
  # shellcheck disable=SC2153
  echo "machine $MACHINE: NHOSTS=$NHOSTS NGPUS=$NGPUS WORKING_DIR=$WORKING_DIR"
  echo "launch = $DIST_LAUNCH"
}

ezpz_setup_env() {
  ezpz_setup_python && ezpz_setup_job
}

# Runs a command on every device of the job; options before `--` are those of our launcher.
launch() {
  case "${1:-}" in
    -*) megatron_launch "$@" ;;
    *) megatron_launch -- "$@" ;;
  esac
}

megatron_launch() {
  local candidate python
  for candidate in $(python_candidates); do
    if python=$(recent_python "$candidate"); then
      PYTHONPATH="$MEGATRON_ROOT${PYTHONPATH:+:$PYTHONPATH}" "$python" -m megatron.launch "$@"
      return
    fi
  done
  echo "error: there is no Python >= 3.10 on PATH: ezpz_setup_python looks for one" >&2
  return 2
}

if [[ "${1:-}" != --functions-only ]]; then
  ezpz_setup_job || echo "note: the job's variables are not set" >&2
fi
