#!/bin/bash
# Every launcher for real, on hosts made of namespaces, in one command; further arguments go to pytest:
#     bash tests/hosts/check.sh [--install] [-k slurm]
# Needs root, and Debian's packages (--install fetches them). 8 minutes on two quiet cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ "${1:-}" == --install ]]; then
  bash tests/hosts/install.sh
  shift
fi
for tool in mpiexec.hydra mpirun.openmpi slurmctld sshd; do
  path=$(PATH=$PATH:/usr/sbin command -v "$tool" || echo "NOT INSTALLED: its cases are skipped")
  printf '%-16s %s\n' "$tool" "$path"
done
exec bash tests/run.sh -n 0 -m hosts tests/hosts -vv --no-header --tb=short --durations=0 --durations-min=1 "$@"
