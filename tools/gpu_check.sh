#!/bin/bash
# What only a machine with an accelerator can show, in one command and at most 25 minutes:
#
#     bash tools/gpu_check.sh [OUT]                  all parts; OUT is gpu-check where it is left out
#     PART=table bash tools/gpu_check.sh OUT         one part: tests, table, step, profile or fp8
#     PART=wheels bash tools/gpu_check.sh wheels     fetches what such a machine lacks (needs a network)
#     WHEELS=wheels bash tools/gpu_check.sh OUT      installs that first, beside the torch that is there
#     REHEARSE=1 bash tools/gpu_check.sh OUT         small shapes on any machine: figures mean nothing
#
# OUT holds PART.md, all tables and a line for each step, and PART.tar.gz: JSON, flame graph, logs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=ALCF/helpers.sh
source ALCF/helpers.sh --functions-only

part=${PART:-all}
out=${1:-gpu-check}
rehearse=${REHEARSE:-0}
wheels=${WHEELS:-}
lines=()
failed=0

# Python 3.12 on x86-64 unless FOR_PYTHON and FOR_MACHINE say otherwise. DeepSpeed comes as source
# and builds its kernels where it runs.
fetch_wheels() {
  local pinned package
  pinned=$(grep -i '^deepspeed==' requirements.txt)
  mkdir -p "$1"
  DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$1" "$pinned"
  for package in hjson msgpack py-cpuinfo einops pydantic torchao litgpt jsonargparse accelerate; do
    # Of all that these need the machine has torch and what torch needs; pydantic has needs of its own.
    local needs=(--no-deps)
    if [[ $package == pydantic ]]; then needs=(); fi
    "$PYTHON" -m pip download -q "${needs[@]}" --only-binary=:all: -d "$1" \
      --python-version "${FOR_PYTHON:-3.12}" --implementation cp \
      --platform "manylinux_2_28_${FOR_MACHINE:-x86_64}" --platform "manylinux_2_17_${FOR_MACHINE:-x86_64}" \
      --platform "manylinux2014_${FOR_MACHINE:-x86_64}" "$package"
  done
  du -sh "$1"
}

# step NAME SECONDS COMMAND...   a step that fails or is late does not keep the next from running
step() {
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  echo "== $name: $*"
  timeout --kill-after=20 "$limit" "$@" >"$work/$name.log" 2>&1 || status=$?
  tail -n 25 "$work/$name.log"
  if [[ $status != 0 ]]; then failed=1; fi
  lines+=("| $name | $([[ $status == 0 ]] && echo ok || echo "status $status") | $((SECONDS - began)) s | \`$*\` |")
}

wants() { [[ $part == all || $part == "$1" ]]; }

case $part in all | tests | table | step | profile | fp8 | wheels) ;; *)
  echo "error: PART=$part: all, tests, table, step, profile, fp8 or wheels" >&2
  exit 2
  ;;
esac
find_python
if [[ $part == wheels ]]; then
  fetch_wheels "$out"
  exit 0
fi
if [[ -n "$wheels" ]]; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
for candidate in $(python_candidates); do
  if has_packages "$candidate" torch deepspeed; then PYTHON=$candidate && break; fi
done
if ! has_packages "$PYTHON" torch deepspeed; then
  echo "error: $PYTHON lacks torch or deepspeed: bring wheels with WHEELS=FOLDER, made by PART=wheels" >&2
  exit 2
fi

mkdir -p "$out"
work=$(mktemp -d)
table=(--minutes 8 --row-minutes 3)
step_options=(--shape 1b --dtype bf16 --rounds 5)
profile_options=(--shape llama3-14 --dtype bf16 --arm ours:COMPILE=1)
fp8=(--rows llama3-3B:14 --row-minutes 3 --set FP8=1)
if [[ $rehearse == 1 ]]; then
  table=(--rehearse --set COMPILE=0 TRAIN_ITERS=6)
  step_options=(--shape tiny --rounds 2 --seconds 0.2 --arms ours hf)
  profile_options=(--shape tiny --steps 1)
  fp8=(--rehearse --set FP8=0 COMPILE=0 TRAIN_ITERS=6)
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not (torch.cuda.is_available() or torch.xpu.is_available()))'; then
  echo "error: torch sees no accelerator here; REHEARSE=1 runs the same steps with small shapes" >&2
  exit 2
fi

step environment 60 "$PYTHON" tools/doctor.py
if wants tests; then
  mapfile -t files < <(grep -rlE 'mark[.]gpu' tests --include='*.py')
  step tests 240 "$PYTHON" -m pytest -q -rs -m gpu "${files[@]}"
fi
if wants table; then step table 600 "$PYTHON" tools/benchmark.py seed-table "${table[@]}" --out "$work"; fi
if wants step; then step step 360 "$PYTHON" tools/benchmark.py step "${step_options[@]}" --out "$work"; fi
if wants profile; then step profile 150 "$PYTHON" tools/benchmark.py profile "${profile_options[@]}" --out "$work"; fi
if wants fp8; then step fp8 200 "$PYTHON" tools/benchmark.py seed-table "${fp8[@]}" --name fp8 --out "$work"; fi

{
  printf '# What an accelerator shows\n\n| step | outcome | time | command |\n| --- | --- | --- | --- |\n'
  printf '%s\n' "${lines[@]}"
  for file in "$work"/*.md; do
    if [[ -f $file ]]; then echo && cat "$file"; fi
  done
} >"$out/$part.md"
tar -czf "$out/$part.tar.gz" -C "$work" .
rm -r "$work"
echo "== $out/$part.md"
exit "$failed"
