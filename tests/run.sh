#!/bin/bash
# Runs the tests that need neither an accelerator nor patience; further arguments go to pytest:
#     bash tests/run.sh -k launch          bash tests/run.sh -m long
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=ALCF/helpers.sh
source ALCF/helpers.sh --functions-only
find_python
setup_python requirements.txt requirements-dev.txt -- pytest hypothesis

unset TORCHDYNAMO_DISABLE
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled
exec "$PYTHON" -m pytest -q -m "not long and not gpu" "$@"
