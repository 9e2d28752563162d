"""What makes a step fast gives the plain step's losses and gradient norms over 20 steps.

Plain: eager blocks, all logits at once, DeepSpeed's reduction after the backward pass. SGD, and a
clip that binds at every step. Compiled blocks alone: `tests/engine/test_compiled.py`.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from megatron.engine import compiled
from megatron.parallel import head_loss
from tests.equivalence import front
from tests.equivalence.case import Case
from tests.spawn import run

STEPS = 20
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
LAYOUTS = {
    "tp1": Case(gas=2),
    "tp2": Case(tp=2, gas=2),
    "zero0": Case(dp=2, zero_stage=0, gas=2),
    "zero1": Case(dp=2, zero_stage=1, gas=2),
    "zero2": Case(dp=2, zero_stage=2, gas=2),
}
PLAIN = {"COMPILE": "0", "ENGINE": "deepspeed"}
FAST = {
    "chunked": {},
    "overlapped": {"ENGINE": "sharded"},
    "all": {"COMPILE": "1", "ENGINE": "sharded"},
}
WHOLE = 1 << 40


def curve(variables: dict[str, str], chunk: int) -> front.Curve:
    """20 steps with logits of `chunk` tokens at a time; blocks' graphs run without inductor."""
    torch._dynamo.reset()
    compiled.BACKEND = "aot_eager"
    head_loss.CHUNK_BYTES, head_loss.CHUNK_TOKENS = 0, chunk
    return front.train(variables, STEPS)


@cache
def trained(layout: str, dtype: str, fast: str) -> list[front.Curve]:
    """Of each rank; `fast` empty: the plain path."""
    settings = {"NLAYERS": "2", "DTYPE": dtype, "LR": {"fp32": "0.5", "bf16": "0.1"}[dtype]}
    variables = LAYOUTS[layout].variables() | settings | PLAIN | FAST.get(fast, {})
    chunk = 24 if fast in ("chunked", "all") else WHOLE  # of the 64 or 128 of a micro-batch
    environ = {"TORCHDYNAMO_DISABLE": "0"} if variables["COMPILE"] == "1" else {}
    return run(curve, LAYOUTS[layout].world, variables, chunk, timeout=240, environ=environ)


@pytest.mark.parametrize(
    ("layout", "dtype", "fast"),
    [
        pytest.param(
            *case, marks=[] if case == ("zero2", "fp32", "overlapped") else pytest.mark.long
        )
        for case in itertools.product(LAYOUTS, TOLERANCE, FAST)
    ],
)
def test_fast_is_plain(layout: str, dtype: str, fast: str) -> None:
    limit, plain = TOLERANCE[dtype], trained(layout, dtype, "")
    for want, got in zip(plain, trained(layout, dtype, fast), strict=True):
        assert len(got) == STEPS and min(norm for _, norm in want) > 0.3  # the clip
        for (loss, norm), (expected, expected_norm) in zip(got, want, strict=True):
            assert loss == pytest.approx(expected, abs=limit)
            assert norm == pytest.approx(expected_norm, rel=limit, abs=limit)
