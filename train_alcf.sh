#!/bin/bash --login
# Trains a Llama or SmolLM model in 3D parallel:
#
#     [VAR=value ...] bash train_alcf.sh [--flag value ...]     --help lists all of them
#     DRY_RUN=1 bash train_alcf.sh                              prints the plan, starts nothing
#     qsub -A PROJECT -q QUEUE -l select=2 -l walltime=1:00:00 -l filesystems=home:NAME train_alcf.sh
#     sbatch -A PROJECT -N 2 -t 60 -C gpu train_alcf.sh
#     (variables travel by name: qsub -v NLAYERS=8,TP=2 ...; sbatch takes them as they are)
#
#PBS -N train_alcf
#PBS -j oe
#SBATCH --job-name=train_alcf
#SBATCH --signal=B:USR1@300
# (Slurm sends SIGUSR1 five minutes before the end: the run then saves a checkpoint and stops.)

set -euo pipefail
trap '' USR1 # until the ranks listen for it there is nothing to save; they know the job's end anyway

# A scheduler runs a copy of this script, elsewhere: the project is where the job was submitted.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for root in "$root" "${PBS_O_WORKDIR:-}" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
  if [[ -n "$root" && -f "$root/megatron/launch/start.py" ]]; then break; fi
done
if [[ ! -f "$root/megatron/launch/start.py" ]]; then
  echo "error: $root is not the project's folder: submit or start train_alcf.sh from there" >&2
  exit 2
fi
if [[ "$root" != "$PWD" ]]; then
  echo "working in $root: relative paths start there"
  cd "$root"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# shellcheck source=ALCF/helpers.sh
source ALCF/helpers.sh --functions-only
case "${DEBUG:-}" in '' | 0 | false | no | off) ;; *) set -x ;; esac

# Any Python validates the settings, before there is an environment: a mistake costs no set-up.
find_python
status=0
"$PYTHON" -m megatron.launch.start --check "$@" || status=$?
case $status in
  0) ;;
  100) exit 0 ;; # a dry run or --help: all is printed
  *) exit "$status" ;;
esac

setup_python requirements.txt
exec "$PYTHON" -m megatron.launch.start "$@"
