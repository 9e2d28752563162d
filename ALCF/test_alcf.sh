#!/bin/bash --login
# A smoke test of a node or a job, in a few minutes: what every rank sees, then ten steps on the
# built-in corpus. Further variables and flags are those of train_alcf.sh:
#
#     bash ALCF/test_alcf.sh                    in an interactive job, or on a laptop
#     NLAYERS=2 bash ALCF/test_alcf.sh
set -euo pipefail
cd "${PBS_O_WORKDIR:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"

# shellcheck source=ALCF/helpers.sh
source ALCF/helpers.sh --functions-only
find_python
setup_python requirements.txt

if [[ -f tools/test_dist.py ]]; then
  echo "== the ranks and their collectives"
  PATH=${PYTHON%/*}:$PATH megatron_launch -- "$PYTHON" tools/test_dist.py
fi

echo "== ten steps"
export MODEL_ARCH=${MODEL_ARCH:-debug} TRAIN_ITERS=${TRAIN_ITERS:-10} DATA_FILE_LIST=${DATA_FILE_LIST:-builtin}
export RUN_NAME=${RUN_NAME:-smoke-$(date +%Y%m%d-%H%M%S)}
bash train_alcf.sh "$@"
echo "== all is well"
