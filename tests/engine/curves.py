"""`python -m tests.engine.curves`: losses and gradient norms of some layouts, as JSON.

Run under another torch or DeepSpeed (PYTHONPATH=FOLDER of `pip install --target FOLDER`) it says
whether that version computes the same.
"""

from __future__ import annotations

import json
import sys

import deepspeed
import torch

from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import RankError, run

STEPS = 4
CASES: dict[str, dict[str, str]] = {
    "tp2": Case(tp=2, tied=True).variables(),
    "zero0-bf16": Case(dp=2, zero_stage=0, dtype="bf16", gas=2).variables(),
    "zero1": Case(dp=2, gas=2).variables(),
    "zero1-fp16": Case(dp=2, dtype="fp16").variables(),
    "zero2": Case(dp=2, zero_stage=2, gas=2).variables(),
    "sharded": Case(dp=2, zero_stage=2, gas=2, dtype="bf16").variables(),
    "zero3": Case(dp=2, zero_stage=3, gas=2).variables(),
    "pp2": Case(pp=2, gas=2, tied=True).variables(),
    "pp2-bf16": Case(pp=2, gas=2, dtype="bf16").variables(),
    "sp2": Case(sp=2).variables(),
    "host": Case(dp=2, zero_stage=2).variables() | {"CPU_OPTIMIZER": "1", "OPT": "adamw"},
    "dualpipev": Case(pp=2, gas=4).variables() | {"PIPELINE_SCHEDULE": "dualpipev"},
    "mics": Case(dp=4, zero_stage=3).variables() | {"MICS_SHARD_SIZE": "2"},
    "hpz-tp2": Case(tp=2, dp=2, zero_stage=3).variables() | {"ZERO_HPZ_PARTITION_SIZE": "2"},
}


def curves(names: list[str]) -> dict[str, object]:
    """Case -> (loss, gradient norm) of each step, the same on all ranks; or the error's end."""
    found: dict[str, object] = {}
    for name in names:
        variables = CASES[name] | {"ENGINE": "sharded" if name == "sharded" else "deepspeed"}
        try:
            made = run(front.train, front.world(variables), variables, STEPS, True, timeout=120)
        except RankError as error:
            found[name] = str(error)[-2000:]
            continue
        found[name] = made[0] if all(curve == made[0] for curve in made) else made
    return found


if __name__ == "__main__":
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    print(json.dumps({"versions": versions, "curves": curves(sys.argv[1:] or list(CASES))}))
