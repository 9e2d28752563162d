#!/bin/bash
# Runs the tests that need neither an accelerator nor patience, two files at a time; further arguments go to pytest:
#     bash tests/run.sh -k launch          bash tests/run.sh -m long          bash tests/run.sh -n 0 -x --pdb tests/config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=ALCF/helpers.sh
source ALCF/helpers.sh --functions-only
find_python
setup_python requirements.txt requirements-dev.txt -- pytest hypothesis xdist

unset TORCHDYNAMO_DISABLE
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile -m "not long and not gpu" "$@"
